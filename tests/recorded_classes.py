"""Pipeline classes that no family serves: each recorded, distilled for two steps, exported and proven, as a table.

python tests/recorded_classes.py [CLASS ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "toys"))

from tiny_unknown import BUILDERS, run_of

from stepdistill.errors import UserError


def row(name: str) -> str:
    """What was found of a class, or why it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            said, proof = run_of(name, Path(folder), lora_rank=0)
        except UserError as error:
            return f"| {name} | refused | {str(error).split('. A family of your own')[0]} |"
    found = said.partition("replay equal, ")[2].partition("\n")[0]
    return f"| {name} | verified, {proof.partition('drawn in ')[2].partition(' by plain')[0]} | {found} |"


if __name__ == "__main__":
    print("| class | student | what was found |\n| --- | --- | --- |")
    for name in sys.argv[1:] or sorted(BUILDERS):
        print(row(name), flush=True)
