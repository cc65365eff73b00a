"""Finished runs side by side, ranked only where their numbers mean the same."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError

# Numbers under two values of one of these cannot be ranked.
SAME_FIELDS = ("suite", "n")


@dataclass(frozen=True)
class Row:
    """One run at one number of steps.

    Attributes:
        name: the run's name, or its folder's.
        method: its method.
        steps: network evaluations per image.
        fd: Frechet distance of the student, lower is better; None where it was not measured.
        clip_score: CLIP score of the student, higher is better.
        gap_closed: share of the way from the one-step teacher to the full teacher, 1 is the teacher.
        train_seconds, peak_memory_bytes: what the training took.
    """

    name: str
    method: str
    steps: int
    fd: float | None
    clip_score: float | None
    gap_closed: float | None
    train_seconds: float | None
    peak_memory_bytes: int | None


COLUMNS = ("run", "method", "steps", "FD", "CLIP", "gap closed", "train", "memory")


def read_report(path: str | Path) -> dict[str, Any]:
    """The report of a run folder, the report.json itself, or what ``stepdistill eval`` wrote.

    A missing name becomes the folder's.

    Raises:
        UserError: no report there, or not a report.
    """
    place = Path(path)
    file = place / "report.json" if place.is_dir() else place
    if not file.is_file():
        raise UserError(
            f"{path}: there is no report.json; give the folder of a finished run, or the file itself"
        )
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a JSON file: {error}") from None
    if isinstance(report, dict) and "scores" in report:
        report = _from_evaluation(report, file)
    missing = [key for key in ("suite", "n", "student") if not isinstance(report, dict) or key not in report]
    if missing:
        raise UserError(f"{file}: not a report of a run: it has no {', '.join(missing)}")
    named: dict[str, Any] = {"name": file.resolve().parent.name, "method": "-"} | report
    return named


def _from_evaluation(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """What ``stepdistill eval`` wrote, in the form of a run's report."""
    scores: dict[str, dict[str, Any]] = report["scores"]
    student = {key: {steps: score[key] for steps, score in scores.items()} for key in ("fd", "clip_score")}
    return {"name": file.stem, "method": "-", **report, "student": student}


def rank(reports: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per run and number of steps: by steps, then by Frechet distance, best first.

    Raises:
        UserError: the reports were measured differently; the field and its values are named.
    """
    for field in SAME_FIELDS:
        values = {str(report[field]): report["name"] for report in reports}
        if len(values) > 1:
            found = ", ".join(f"{value} ({name})" for value, name in values.items())
            raise UserError(
                f"these reports cannot be ranked: {field} differs: {found}; evaluate them with one suite"
            )
    rows = [row for report in reports for row in _rows(report)]
    return sorted(rows, key=lambda row: (row.steps, row.fd is None, row.fd or 0.0))


def _rows(report: dict[str, Any]) -> list[Row]:
    student = report["student"]
    fd, clip = student.get("fd") or {}, student.get("clip_score") or {}
    gap = report.get("gap_closed") or {}
    return [
        Row(
            name=str(report["name"]),
            method=str(report["method"]),
            steps=int(steps),
            fd=fd.get(steps),
            clip_score=clip.get(steps),
            gap_closed=gap.get(steps),
            train_seconds=report.get("train_seconds"),
            peak_memory_bytes=report.get("peak_memory_bytes"),
        )
        for steps in dict.fromkeys([*fd, *clip])
    ]


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of COLUMNS."""
    return (
        row.name,
        row.method,
        str(row.steps),
        _number(row.fd, "{:.3f}"),
        _number(row.clip_score, "{:.3f}"),
        _number(row.gap_closed, "{:.3f}"),
        _number(row.train_seconds, "{:.0f} s"),
        _number(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, "{:.0f} MiB"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns for a terminal: names to the left, numbers to the right."""
    table = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def html_page(reports: Sequence[dict[str, Any]], folders: Sequence[Path | None]) -> str:
    """A self-contained page: the ranked table, and per run its command, commit, hardware and picture.

    Args:
        reports: as :func:`read_report` returns them.
        folders: each report's run folder, whose samples.png is shown; None where there is none.
    """
    rows = rank(reports)
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>" for row in rows
    )
    runs = "".join(_section(report, folder) for report, folder in zip(reports, folders, strict=True))
    measured = html.escape(f"{reports[0]['suite']}, n = {reports[0]['n']}")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>stepdistill compare</title>"
        "<style>body{font:15px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse}"
        "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
        "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}img{max-width:100%}code{font-size:13px}</style>"
        f"<h1>Runs compared</h1><p>{measured}. FD: lower is better. Gap closed: 0 is the teacher with one step, "
        f"1 the teacher with all of its steps.</p><table><tr>{head}</tr>{body}</table>{runs}</html>\n"
    )


def _section(report: dict[str, Any], folder: Path | None) -> str:
    facts = [f"<h2>{html.escape(str(report['name']))}</h2>"]
    for key in ("command", "hardware", "commit"):
        if key in report:
            facts.append(f"<p>{key}: <code>{html.escape(str(report[key]))}</code></p>")
    picture = folder / "samples.png" if folder is not None else None
    if picture is not None and picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        facts.append(
            f'<img alt="samples of {html.escape(str(report["name"]))}" src="data:image/png;base64,{data}">'
        )
    return "".join(facts)
