"""Finished runs side by side, ranked only where their numbers mean the same. Reads reports; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError

# Numbers under two values of one of these cannot be ranked.
SAME_FIELDS = ("suite", "n")
# The same for what stands in a report's protocol, where both reports state it.
SAME_PROTOCOL = ("resize", "features_sha256", "reference_sha256", "seeds", "neighbours")


@dataclass(frozen=True)
class Row:
    """One run at one number of steps; what was not measured is None.

    Attributes:
        name: the run's name, or its folder's.
        method: its method.
        steps: network evaluations per image.
        gap_closed: share of the way from the one-step teacher to the full teacher, 1 is the teacher.
        fd: Frechet distance of the student, lower is better.
        kid: kernel distance, lower is better.
        clip_score: CLIP score of the student, higher is better.
        recall, density: see stepdistill.metrics; higher is better.
        recall_of_teachers: recall over that of the teacher at full steps.
        ms_per_image: milliseconds of drawing an image, in the batches and on the machine of the evaluation.
        train_seconds, peak_memory_bytes: what the training took.
        updates, updates_planned: optimiser steps done, and in the recipe; fewer where a budget ended the training.
    """

    name: str
    method: str
    steps: int
    gap_closed: float | None
    fd: float | None
    kid: float | None
    clip_score: float | None
    recall: float | None
    density: float | None
    recall_of_teachers: float | None
    ms_per_image: float | None
    train_seconds: float | None
    peak_memory_bytes: int | None
    updates: int | None
    updates_planned: int | None


COLUMNS = (
    "run",
    "method",
    "steps",
    "gap closed",
    "FD",
    "KID",
    "CLIP",
    "recall (of teacher's)",
    "density",
    "ms/image",
    "training",
    "updates",
    "memory",
)


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
    keys = dict.fromkeys(key for score in scores.values() for key in score)
    student = {key: {steps: score.get(key) for steps, score in scores.items()} for key in keys}
    return {"name": file.stem, "method": "-", **report, "student": student}


def rank(reports: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per run and number of steps: by steps, then by Frechet distance, best first.

    Raises:
        UserError: the reports were measured differently; the field and its values are named.
    """
    for field in SAME_FIELDS:
        _require_one_value(field, {str(report["name"]): str(report[field]) for report in reports})
    for field in SAME_PROTOCOL:
        stated = {str(report["name"]): (report.get("protocol") or {}).get(field) for report in reports}
        _require_one_value(
            f"protocol.{field}", {name: str(value) for name, value in stated.items() if value is not None}
        )
    rows = [row for report in reports for row in _rows(report)]
    return sorted(rows, key=lambda row: (row.steps, row.fd is None, row.fd or 0.0))


def _require_one_value(field: str, by_name: Mapping[str, str]) -> None:
    values = {value: name for name, value in by_name.items()}
    if len(values) > 1:
        found = ", ".join(f"{value} ({name})" for value, name in values.items())
        raise UserError(
            f"these reports cannot be ranked: {field} differs: {found}; evaluate them with one suite"
        )


def _rows(report: dict[str, Any]) -> list[Row]:
    student: dict[str, dict[str, Any]] = report["student"]

    def of(metric: str, steps: str) -> Any:
        return (student.get(metric) or {}).get(steps)

    steps_seen = dict.fromkeys([*(student.get("fd") or {}), *(student.get("clip_score") or {})])
    return [
        Row(
            name=str(report["name"]),
            method=str(report["method"]),
            steps=int(steps),
            gap_closed=(report.get("gap_closed") or {}).get(steps),
            fd=of("fd", steps),
            kid=of("kid", steps),
            clip_score=of("clip_score", steps),
            recall=of("recall", steps),
            density=of("density", steps),
            recall_of_teachers=(report.get("recall_of_teachers") or {}).get(steps),
            ms_per_image=None if (s := of("seconds_per_image", steps)) is None else 1000 * s,
            train_seconds=report.get("train_seconds"),
            peak_memory_bytes=report.get("peak_memory_bytes"),
            updates=report.get("updates"),
            updates_planned=report.get("updates_planned"),
        )
        for steps in steps_seen
    ]


def cells(row: Row) -> tuple[str, ...]:
    """The row as text, in the order of COLUMNS."""
    share = "" if row.recall_of_teachers is None else f" ({row.recall_of_teachers:.0%})"
    cut = row.updates is not None and row.updates_planned is not None and row.updates < row.updates_planned
    return (
        row.name,
        row.method,
        str(row.steps),
        _number(row.gap_closed, "{:.3f}"),
        _number(row.fd, "{:.3f}"),
        _number(row.kid, "{:.4f}"),
        _number(row.clip_score, "{:.3f}"),
        _number(row.recall, "{:.3f}") + share,
        _number(row.density, "{:.3f}"),
        _number(row.ms_per_image, "{:.1f}"),
        _number(row.train_seconds, "{:.0f} s"),
        f"{row.updates} of {row.updates_planned}" if cut else _number(row.updates, "{:.0f}"),
        _number(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, "{:.0f} MiB"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns for a terminal: names to the left, numbers to the right. Columns in which no row has
    anything are left out."""
    table = [COLUMNS, *(cells(row) for row in rows)]
    kept = [i for i in range(len(COLUMNS)) if i < 3 or any(line[i] != "-" for line in table[1:])]
    widths = {i: max(len(line[i]) for line in table) for i in kept}
    return "\n".join(
        "  ".join(line[i].ljust(widths[i]) if i < 2 else line[i].rjust(widths[i]) for i in kept).rstrip()
        for line in table
    )
