"""compare.html (one file, nothing fetched) and compare.json: runs side by side, with plots and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stepdistill.comparison.charts import charts
from stepdistill.comparison.ranking import Group, Row, groups, ranks
from stepdistill.comparison.table import filled, notes
from stepdistill.comparison.teachers import teachers
from stepdistill.pages.html import document, embedded_picture, scrolled, table
from stepdistill.pages.picture_rows import STYLE as ROWS_STYLE
from stepdistill.pages.picture_rows import picture_rows
from stepdistill.pages.sheets import read_sheet
from stepdistill.system.files import written_whole
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import Measured

_STYLE = (
    "table.numbers td:nth-child(2),table.numbers th:nth-child(2){text-align:left}"
    "table.numbers{border-collapse:separate;border-spacing:0}"
    "table.numbers td:first-child{position:sticky;left:0;background:var(--paper)}"
)
ABOUT_RUNS = (
    " Gap closed: 0 is the teacher with one step, 1 the teacher with all of its steps. Recall in brackets: over that "
    "of the teacher with all of its steps. An update counts for one network; where a budget ended a training, those "
    "done of those planned."
)
FACTS = ("pipeline", "summary", "command", "hardware", "commit", "verification")


@dataclass(frozen=True)
class Comparison:
    """What is set side by side.

    Attributes:
        reports: of the finished runs, as ``read_report`` gives them, each of another name.
        folders: each report's run folder, None where only a file was given.
        failed: what went wrong, by run.
        without_recipe: methods that were asked for as part of ``all`` and have no recipe.
        repeats: run -> what it is a training of, for runs that differ in their training seed alone.
        origin: command, versions, hardware and commit of the comparison itself.
        shared: what was made once for several runs, a sentence each.
        sheets: PNGs of pictures by their title.
        drawn: the runs whose students are on a sheet.
    """

    reports: Sequence[Measured]
    folders: Sequence[Path | None]
    failed: Mapping[str, str] = field(default_factory=dict)
    without_recipe: Sequence[str] = ()
    repeats: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    shared: Sequence[str] = ()
    sheets: Mapping[str, bytes] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()

    @cached_property
    def groups(self) -> list[Group]:
        """The reports whose numbers mean the same, ranked."""
        return groups(self.reports, self.repeats)


def write(comparison: Comparison, folder: Path) -> Path:
    """Writes compare.json, compare.html and the sheets as compare.png, compare-2.png ...; gives back the page.

    Args:
        comparison: what is compared.
        folder: where to; made where it is missing.
    """
    content = json.dumps(as_json(comparison), indent=1) + "\n"
    page = html_page(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(comparison.sheets.values(), 1):
        (folder / f"compare{f'-{number}' if number > 1 else ''}.png").write_bytes(picture)
    for name, text in (("compare.json", content), ("compare.html", page)):
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")
    return folder / "compare.html"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """compare.json: the groups with their teachers, one entry a run with its scores by step count and its teacher's,
    and what failed."""
    runs = []
    found = groups(comparison.reports)
    rows = [{**asdict(row), "rank": ranks(row, group.rows)} for group in found for row in group.rows]
    for report, folder in zip(comparison.reports, comparison.folders, strict=True):
        own = {int(row["steps"]): row for row in rows if row["name"] == report.name}
        first = next(iter(own.values()), {})
        runs.append(
            {"name": report.name, "method": report.method, "folder": folder and str(folder)}
            | {key: first.get(key) for key in COSTS}
            | {"scores": {str(steps): _scores(row) for steps, row in sorted(own.items()) if report.student}}
            | report.model_dump(
                include={*FACTS, "versions", "teacher_name", "guidance", "suite", "n", "teacher", "conflicts"}
            )
        )
    return {
        "groups": [
            {
                "title": group.title,
                "runs": [report.name for report in group.reports],
                "not_compared_because": list(group.apart),
                "notes": list(group.notes),
                "metrics": group.reports[0].metrics,
                "better": group.reports[0].better,
                "teachers": [asdict(teacher) for teacher in teachers(group.reports)],
                "over_seeds": [asdict(row) for row in group.rows if row.seeds is not None],
            }
            for group in comparison.groups
        ],
        "runs": runs,
        "failed": dict(comparison.failed),
        "without_recipe": list(comparison.without_recipe),
        "shared": list(comparison.shared),
        **comparison.origin,
    }


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, (value, _) in row["own"].items()}
    errors = {f"{name}_se": error for name, (_, error) in row["own"].items()}
    return {key: row[key] for key in SCORES} | own | errors


SCORES = (
    *"rank gap_closed fd fd_se kid kid_se clip_score clip_score_se".split(),
    *"second_fd second_fd_se second_fit second_fit_se recall density recall_of_teachers".split(),
    "ms_per_image",
)
COSTS = "train_seconds peak_memory_bytes updates updates_planned passes".split()


def html_page(comparison: Comparison) -> str:
    """A self-contained page: each group's table and plots, the pictures, and each run's command and machine."""
    reports, several = comparison.reports, len(comparison.groups) > 1
    runs = any(report.gap_closed for report in reports)
    body = [f"<h1>{'Runs' if runs or not reports else 'Evaluations'} compared</h1>"]
    if several:
        body.append(
            f"<p>{len(comparison.groups)} groups: numbers are compared within each, and not between them.</p>"
        )
    for number, group in enumerate(comparison.groups, 1):
        body += _group(group, number if several else 0)
    if comparison.shared:
        body.append(f"<p class=note>{html.escape(' '.join(comparison.shared))}</p>")
    body += [_sheet(title, picture) for title, picture in comparison.sheets.items()]
    if comparison.failed:
        items = "".join(f"<li>{html.escape(k)}: {html.escape(v)}</li>" for k, v in comparison.failed.items())
        body.append(f"<h2>Left out</h2><ul>{items}</ul>")
    if comparison.without_recipe:
        body.append(f"<p>No recipe for: {html.escape(', '.join(comparison.without_recipe))}.</p>")
    body.append("<h2>What was compared</h2>")
    body += [
        _section(report, folder, report.name in comparison.drawn)
        for report, folder in zip(reports, comparison.folders, strict=True)
    ]
    return document("stepdistill compare", _STYLE + ROWS_STYLE, body)


def _group(group: Group, number: int) -> list[str]:
    title = f"{number}. {group.title}" if number else group.title
    parts = [f"<h2>{html.escape(title[0].upper() + title[1:])}</h2>"]
    if group.apart:
        parts.append(
            f"<p class=warning>Not compared with 1, because {html.escape('; '.join(group.apart))}.</p>"
        )
    fd = str(group.reports[0].metrics.get("fd") or "FD")
    if any(row.fd is not None for row in group.rows):
        about = ABOUT_RUNS * any(report.gap_closed for report in group.reports)
        parts.append(f"<p>FD is {html.escape(fd)}: lower is better.{about}</p>")
    if better := group.reports[0].better:
        said = "; ".join(
            f"{name.replace('_', ' ')}: {direction} is better"
            for name, direction in better.items()
            if direction != "neither"
        )
        parts += [f"<p>{html.escape(said)}.</p>"] if said else []
    parts += [f"<p class=warning>{html.escape(note)}</p>" for note in group.notes]
    return [*parts, _table(group.rows), charts(group.rows, group.reports[0].metrics, teachers(group.reports))]


def _table(rows: Sequence[Row]) -> str:
    head, *lines = filled(rows)
    said = " ".join(notes(rows))
    return table(head, lines, "numbers") + (f"<p class=note>{html.escape(said)}</p>" if said else "")


def _sheet(title: str, picture: bytes) -> str:
    sheet = read_sheet(picture)
    if sheet is not None:
        return f"<h2>{html.escape(title)}</h2>{picture_rows(sheet, name=title)}"
    return f"<h2>{html.escape(title)}</h2>{scrolled(embedded_picture(picture, title), title)}"


def _section(report: Measured, folder: Path | None, drawn: bool) -> str:
    """A run's facts, and its own picture where its student is on no sheet."""
    said = {key: getattr(report, key) for key in FACTS}
    facts = table([], [(key, str(value)) for key, value in said.items() if value])
    picture = None if folder is None or drawn else RunFolder(folder).samples
    shown = picture is not None and picture.is_file()
    if picture is not None and shown:
        facts += _sheet(f"Pictures of {report.name}", picture.read_bytes())
    return (
        f"<details{' open' if shown else ''}><summary>{html.escape(report.name)}</summary>{facts}</details>"
    )
