"""The folder of an evaluation, and what it leaves there.

report.json, report.md, report.html
steps_4/manifest.json                    whose rows the shards hold
steps_4/images_000000.safetensors ...    rows of the images drawn with 4 steps, see shards.py
steps_4/diversity_000000.safetensors ... rows of the samples of diversity, where the suite asks it
steps_4/gallery.safetensors              small pictures, see gallery.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.evaluation.scores import Report
from stepdistill.evaluation.suite import Suite
from stepdistill.system.files import check_writable
from stepdistill.system.processes import FAILED, Processes


@contextmanager
def workplace(output: Path | None, processes: Processes) -> Iterator[Path]:
    """The folder that all processes of an evaluation work in; a temporary one, gone afterwards, where none is given.

    Raises:
        UserError: it cannot be written, or another process's is not seen here.
    """
    if output is not None:

        def claim() -> None:
            check_writable(output)
            if processes.main:
                (output / FAILED).unlink(missing_ok=True)

        processes.together(claim)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="stepdistill-") as own:
        folder = Path(processes.gather(own)[0])

        def see() -> None:
            if not folder.is_dir():
                raise UserError(
                    f"{folder} of process 0 is not seen here: give --output, a folder that all share"
                )

        processes.together(see)
        yield folder
        processes.gather(None)  # nobody reads it any more


def steps_folder(folder: Path, steps: int) -> Path:
    """Where the shards and the gallery of a step count lie; 0 is for images that were there already."""
    return folder / f"steps_{steps}"


def write_results(report: Report, folder: Path, suite: Suite) -> None:
    """report.json, report.md and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "report.json")
    (folder / "report.md").write_text(report.markdown() + "\n", "utf-8")
    from stepdistill.evaluation.page import write_page

    write_page(report, folder, suite)
