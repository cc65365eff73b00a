"""What `stepdistill eval` does not do: remake the files of eval/reference.

python eval/evaluate.py reference emoji                                eval/reference/emoji.safetensors
python eval/evaluate.py reference emoji --second                       eval/reference/emoji-judge.safetensors
python eval/evaluate.py teachers                                       eval/reference/teachers.json (minutes)
python eval/evaluate.py teachers --fill                                what its entries lack, cached or drawn
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.evaluation import teacher_scores as teacher_cache
from stepdistill.evaluation.statistics import make_reference
from stepdistill.evaluation.suite import load_suite
from stepdistill.evaluation.teacher_scores import teacher_scores
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.system.emoji import embedded_teachers, teacher_folder
from stepdistill.system.provenance import provenance
from stepdistill.system.shipped import content_folder

# (suite, guidance, steps): what ships for every embedded teacher
SHIPPED = (("emoji-quick", 2.5, (1, 4, 25)), ("emoji", 1.0, (1, 25)), ("emoji", 2.5, (1, 2, 4, 8, 25)))


def teachers(names: list[str], quiet: bool, fill: bool) -> None:
    """Compute the shipped scores and write teachers.json; entries of other teachers stay, and with ``fill`` every score
    that is there."""
    file = content_folder("eval") / "reference" / teacher_cache.SHIPPED
    entries = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for name in names:
        folder = teacher_folder(name)
        before = {key: entry["scores"] for key, entry in entries.items() if fill}
        if not fill:
            entries = {key: entry for key, entry in entries.items() if entry["teacher"] != name}
        for suite_name, guidance, steps in SHIPPED:
            suite = load_suite(suite_name)
            origin = provenance()
            for count in reversed(steps):
                key = teacher_cache.key(weights_hash(folder), suite, count, guidance)
                kept = before.get(key, {})
                if teacher_cache.NEWEST in kept:
                    continue
                found = teacher_scores(
                    folder, suite, steps=count, guidance=guidance, progress=not quiet, refresh=not fill
                )
                scores = {k: v for k, v in asdict(found[count]).items() if k != "cached"}
                if kept and abs(kept["fd"] - scores["fd"]) > 0.01 * scores["fd"]:
                    raise SystemExit(f"{suite.label}, {count} steps: FD is {scores['fd']}, was {kept['fd']}")
                scores |= kept
                about = {"teacher": name, "suite": suite.label, "guidance": guidance, "steps": count}
                entries[key] = {
                    **about,
                    "scores": scores,
                    "versions": origin["versions"],
                    "hardware": origin["hardware"],
                }
                file.write_text(json.dumps(entries, indent=1) + "\n", "utf-8")
                print(json.dumps({**about, **scores}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    reference = verbs.add_parser("reference")
    reference.add_argument("suite")
    reference.add_argument("--second", action="store_true", help="of the second features")
    reference.add_argument("--output", type=Path)
    table = verbs.add_parser("teachers")
    table.add_argument("names", nargs="*", default=list(embedded_teachers()))
    table.add_argument("--quiet", action="store_true")
    table.add_argument("--fill", action="store_true")
    given = parser.parse_args()
    try:
        if given.verb == "reference":
            suite = load_suite(given.suite)
            name = suite.second_reference if given.second else suite.reference
            if name is None:
                raise UserError(f"suite {suite.label} has no second features")
            output = given.output or content_folder("eval") / "reference" / name
            make_reference(suite, output, second=given.second)
            print(output)
        else:
            teachers(given.names, given.quiet, given.fill)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
