"""compare.html (one file, nothing fetched) and compare.json: runs side by side, with plots and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.comparison.ranking import filled, not_told_apart, rank
from stepdistill.pages.html import document, embedded_picture, table
from stepdistill.pages.plots import Series, line_plot
from stepdistill.system.files import written_whole
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import Measured

_STYLE = "td,th{text-align:right}td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}"
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
        reports: of the finished runs, as ``read_report`` gives them.
        folders: each report's run folder, None where only a file was given.
        failed: what went wrong, by run.
        without_recipe: methods that were asked for as part of ``all`` and have no recipe.
        origin: command, versions, hardware and commit of the comparison itself.
    """

    reports: Sequence[Measured]
    folders: Sequence[Path | None]
    failed: Mapping[str, str] = field(default_factory=dict)
    without_recipe: Sequence[str] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def write(comparison: Comparison, folder: Path, picture: bytes | None = None) -> Path:
    """Writes compare.json, compare.html and, where there is one, compare.png; gives back the page.

    Args:
        comparison: what is compared.
        folder: where to; made where it is missing.
        picture: PNG of the same prompts drawn by every student.

    Raises:
        UserError: the reports were measured differently.
    """
    content = json.dumps(as_json(comparison), indent=1) + "\n"
    page = html_page(comparison, picture)
    folder.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        (folder / "compare.png").write_bytes(picture)
    for name, text in (("compare.json", content), ("compare.html", page)):
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "compare.html"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """compare.json: one entry a run with its scores by step count, the teacher's scores, and what failed."""
    rows = rank(comparison.reports)
    runs = []
    for report, folder in zip(comparison.reports, comparison.folders, strict=True):
        own = {row.steps: asdict(row) for row in rows if row.name == report.name}
        scores = {str(steps): {key: row[key] for key in SCORES} for steps, row in sorted(own.items())}
        first = next(iter(own.values()), {})
        runs.append(
            {"name": report.name, "method": report.method, "folder": folder and str(folder)}
            | {key: first.get(key) for key in COSTS}
            | {"scores": scores}
            | report.model_dump(include={*FACTS, "versions", "teacher_name", "guidance"})
        )
    one = comparison.reports[0] if comparison.reports else None
    return {
        "suite": one and one.suite,
        "n": one and one.n,
        "metrics": one and one.metrics,
        "teacher": _teacher(comparison.reports),
        "runs": runs,
        "failed": dict(comparison.failed),
        "without_recipe": list(comparison.without_recipe),
        **comparison.origin,
    }


SCORES = (
    *"gap_closed fd fd_se kid kid_se clip_score clip_score_se recall density recall_of_teachers".split(),
    "ms_per_image",
)
COSTS = "train_seconds peak_memory_bytes updates updates_planned".split()


def _teacher(reports: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """The teachers' scores of all reports by metric and step count; the first report that has one is taken."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for metric, scores in report.teacher.items():
            found[metric] = {**scores, **found.get(metric, {})}
    return found


def html_page(comparison: Comparison, picture: bytes | None = None) -> str:
    """A self-contained page: the ranked table, plots, the students' pictures, and each run's command and machine.

    Raises:
        UserError: the reports were measured differently.
    """
    reports = comparison.reports
    runs = any(report.gap_closed for report in reports)
    body = [f"<h1>{'Runs' if runs or not reports else 'Evaluations'} compared</h1>"]
    if reports:
        fd = reports[0].metrics.get("fd") or "FD"
        body += [
            f"<p>Suite {html.escape(str(reports[0].suite))}, n = {html.escape(str(reports[0].n))}. FD is "
            f"{html.escape(fd)}: lower is better.{ABOUT_RUNS * runs}</p>",
            _table(comparison),
            _plots(comparison, fd),
        ]
    if picture is not None:
        body.append(f"<h2>The same prompts and seeds</h2>{embedded_picture(picture, 'samples')}")
    if comparison.failed:
        items = "".join(f"<li>{html.escape(k)}: {html.escape(v)}</li>" for k, v in comparison.failed.items())
        body.append(f"<h2>Failed</h2><ul>{items}</ul>")
    if comparison.without_recipe:
        body.append(f"<p>No recipe for: {html.escape(', '.join(comparison.without_recipe))}.</p>")
    body += [
        _section(report, folder, picture is None)
        for report, folder in zip(reports, comparison.folders, strict=True)
    ]
    return document("stepdistill compare", _STYLE, body)


def _table(comparison: Comparison) -> str:
    """The ranked rows, with those whose distance is within the standard errors of each other's."""
    rows = rank(comparison.reports)
    alike = [", ".join(not_told_apart(row, rows)) for row in rows]
    head, *lines = filled(rows)
    if any(alike):
        head = (*head, "FD not told apart from")
        lines = [(*line, names) for line, names in zip(lines, alike, strict=True)]
    known = any(row.fd_se is not None for row in rows)
    note = "<p>± is one standard error. FDs are not told apart where they differ by no more than the sum of theirs.</p>"
    return table(head, lines) + note * known


def _plots(comparison: Comparison, fd: str) -> str:
    """FD against steps, the teacher's dashed, and FD at each run's best step count against its training time."""
    rows = rank(comparison.reports)
    by_steps, by_time = [], []
    for report in comparison.reports:
        own = [row for row in rows if row.name == report.name and row.fd is not None]
        by_steps.append(Series(report.name, [(row.steps, row.fd) for row in own if row.fd]))
        best = min(own, key=lambda row: row.fd or 0.0, default=None)
        if best is not None and best.fd and best.train_seconds:
            label = f"{report.name} ({best.steps} step{'s' * (best.steps > 1)})"
            by_time.append(Series(label, [(best.train_seconds / 60, best.fd)]))
    teacher = (_teacher(comparison.reports).get("fd") or {}).items()
    points = [(float(steps), float(score)) for steps, score in teacher if score]
    ticks = sorted({row.steps for row in rows} | {steps for steps, _ in points})
    if points:
        by_steps.append(Series("teacher", points, dashed=True))
    first = line_plot(by_steps, "steps", fd, ticks)
    second = line_plot(by_time, "training, minutes", fd)
    return "".join(
        f"<h2>{html.escape(fd)} against {what}</h2>{plot}"
        for what, plot in (("steps", first), ("training time", second))
        if plot
    )


def _section(report: Measured, folder: Path | None, with_picture: bool) -> str:
    facts = [f"<h2>{html.escape(str(report.name))}</h2>"]
    said = {key: getattr(report, key) for key in FACTS}
    facts += [f"<p>{key}: <code>{html.escape(str(value))}</code></p>" for key, value in said.items() if value]
    picture = RunFolder(folder).samples if folder is not None and with_picture else None
    if picture is not None and picture.is_file():
        facts.append(embedded_picture(picture.read_bytes(), f"samples of {report.name}"))
    return "".join(facts)
