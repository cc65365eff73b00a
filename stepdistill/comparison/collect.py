"""Finished runs and evaluations gathered from where they lie, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stepdistill.comparison.page import Comparison, write
from stepdistill.errors import UserError
from stepdistill.system.log import say
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import Measured, RunReport, read_report


def collect(paths: Sequence[str], command: str) -> Comparison:
    """Finished runs and evaluations by their folders or reports; what is given twice counts once. Runs that have not
    ended are named among the failed ones.

    Raises:
        UserError: one of them is none, or none of them has ended.
    """
    places = list({Path(path).resolve(): Path(path) for path in paths}.values())
    going = [place for place in places if _unfinished(place)]
    ended = [place for place in places if place not in going]
    if not ended:
        raise UserError(f"{', '.join(map(str, going))}: no report.json yet; compare runs that have ended")
    found = [read_report(place) for place in ended]
    names = short_names([report.name for report in found], ended)
    reports: list[Measured] = [
        report.model_copy(update={"name": name}) for report, name in zip(found, names, strict=True)
    ]
    folders = [place if place.is_dir() else place.parent for place in ended]
    kept = [
        place if isinstance(report, RunReport) or any(place.glob("steps_*/gallery.safetensors")) else None
        for report, place in zip(reports, folders, strict=True)
    ]  # a file of an evaluation may lie anywhere
    failed = {place.resolve().name: "it has not ended: it has no report.json" for place in going}
    return Comparison(reports, kept, failed, origin={"command": command})


def _unfinished(place: Path) -> bool:
    run = RunFolder(place)
    return run.recipe.is_file() and not run.report.is_file()


def short_names(names: Sequence[str], places: Sequence[Path]) -> list[str]:
    """Names that tell reports apart: their own, and of those that share one the shortest ends of their paths.

    Args:
        names: the reports' own.
        places: where they lie, all different.
    """
    parts = [
        place.resolve().with_suffix("" if place.suffix == ".json" else place.suffix).parts for place in places
    ]
    found = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        rows = [row for row, other in enumerate(names) if other == name]
        depth = 1
        while len({parts[row][-depth:] for row in rows}) < len(rows) and depth < max(map(len, parts)):
            depth += 1
        for row in rows:
            found[row] = "/".join(parts[row][-depth:])
    return found


def write_all(compared: Comparison, folder: Path) -> Path:
    """The page with all pictures: of the students of one teacher on the same prompts, a sheet for each teacher, and
    those that evaluations kept, a sheet for each size; gives back the page. Students are drawn only where the runs'
    own pictures are not of the same prompts."""
    from stepdistill.comparison.pictures import common_sheet, draw_students, kept_sheets

    by_teacher: dict[tuple[str, float], list[tuple[str, Path]]] = {}
    for report, place in zip(compared.reports, compared.folders, strict=True):
        manifest = place and RunFolder(place).student / "verification" / "manifest.json"
        if place is not None and manifest is not None and manifest.is_file():
            key = (str(report.teacher_name), report.guidance or 1.0)
            runs = by_teacher.setdefault(key, [])
            again = compared.repeats.get(report.name)
            if again is None or again not in [
                compared.repeats.get(name) for name, _ in runs
            ]:  # one seed is enough
                runs.append((report.name, place))
    sheets: dict[str, bytes] = {}
    shown: set[str] = set()
    for (teacher, guidance), runs in by_teacher.items():
        title = f"The same prompts and seeds, teacher {Path(teacher).name}, guidance {guidance:g}"
        try:
            sheets[title] = common_sheet(runs) or draw_students(runs, teacher, guidance)
            shown |= {name for name, _ in runs}
        except UserError as error:
            say(f"no common pictures: {error}")
    sheets |= kept_sheets([(report, place) for report, place in zip(compared.reports, compared.folders, strict=True)
                           if place is not None and not isinstance(report, RunReport)])  # fmt: skip
    return write(replace(compared, sheets=sheets, drawn=frozenset(shown)), folder)
