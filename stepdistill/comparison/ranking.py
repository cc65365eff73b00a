"""Finished runs and evaluations side by side, ranked only where their numbers mean the same. Reads reports; imports no
torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.errors import UserError
from stepdistill.pages.numbers import with_error
from stepdistill.training.run_report import Measured, RunReport

# Numbers under two values of one of these cannot be ranked, nor of any field of the protocol that both reports state.
SAME_FIELDS = ("suite", "n")
# What only adds a score or an error of its own moves no other.
APART = ("diversity", "standard_errors")
# What makes an evaluation's number mean anything: a report that does not state it is not ranked with one that does.
ESSENTIAL = ("resize", "features_sha256", "reference_sha256", "suite_sha256")


@dataclass(frozen=True)
class Row:
    """One run at one number of steps; what was not measured is None.

    Attributes:
        name: the run's name, or its folder's.
        method: its method.
        steps: network evaluations per image; 0 of images that were there already.
        gap_closed: share of the way from the one-step teacher to the full teacher, 1 is the teacher.
        fd, fd_se: Frechet distance of the student, lower is better, and its standard error.
        kid, kid_se: kernel distance, lower is better, and its standard error.
        clip_score, clip_score_se: CLIP score of the student, higher is better, and its standard error.
        recall, density: see stepdistill.metrics; higher is better.
        recall_of_teachers: recall over that of the teacher at full steps.
        ms_per_image: milliseconds of drawing an image, in the batches and on the machine of the evaluation.
        train_seconds, peak_memory_bytes: what the training took.
        updates, updates_planned: updates done, and in the recipe; fewer where a budget ended the training.
    """

    name: str
    method: str
    steps: int
    gap_closed: float | None
    fd: float | None
    fd_se: float | None
    kid: float | None
    kid_se: float | None
    clip_score: float | None
    clip_score_se: float | None
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


def rank(reports: Sequence[Measured]) -> list[Row]:
    """One row per run and number of steps: by steps, then by Frechet distance, best first.

    Raises:
        UserError: the reports were measured differently; every field that differs is named, with its values.
    """
    if found := differences(reports):
        raise UserError(f"these reports cannot be ranked: {'; '.join(found)}; evaluate them with one suite")
    rows = [row for report in reports for row in _rows(report)]
    return sorted(rows, key=lambda row: (row.steps, row.fd is None, row.fd or 0.0))


def differences(reports: Sequence[Measured]) -> list[str]:
    """What was not measured alike, each field with its values. Command, machine, versions, commit and times do not
    matter; neither do seeds of images that were there already, which nobody states."""
    protocols = [report.protocol for report in reports]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    found = [
        _values(field, ((report, getattr(report, field)) for report in reports)) for field in SAME_FIELDS
    ]
    for key in sorted(keys, key=lambda key: key == "suite_sha256"):  # which differs with most others: last
        if key not in APART:
            needed = key in ESSENTIAL
            stated = (
                (
                    report,
                    protocol.get(key, "not stated" if needed and not isinstance(report, RunReport) else None),
                )
                for report, protocol in zip(reports, protocols, strict=True)
            )
            found.append(_values(f"protocol.{key}", stated))
    return [text for text in found if text]


def _values(field: str, stated: Iterable[tuple[Measured, Any]]) -> str:
    """The values of a field and who has them, where there is more than one; None is not a value."""
    by_value = {str(value): report.name for report, value in stated if value is not None}
    if len(by_value) < 2:
        return ""
    return f"{field} differs: " + ", ".join(f"{_short(value)} ({name})" for value, name in by_value.items())


def _short(value: str) -> str:
    """Hashes by their first digits."""
    return f"{value[:16]}..." if re.fullmatch("[0-9a-f]{64}", value) else value


def _rows(report: Measured) -> list[Row]:
    student = report.student

    def of(metric: str, steps: str) -> Any:
        return (student.get(metric) or {}).get(steps)

    steps_seen = dict.fromkeys([*(student.get("fd") or {}), *(student.get("clip_score") or {})])
    return [
        Row(
            name=report.name,
            method=report.method,
            steps=int(steps),
            gap_closed=report.gap_closed.get(steps),
            fd=of("fd", steps),
            fd_se=of("fd_se", steps),
            kid=of("kid", steps),
            kid_se=of("kid_se", steps),
            clip_score=of("clip_score", steps),
            clip_score_se=of("clip_score_se", steps),
            recall=of("recall", steps),
            density=of("density", steps),
            recall_of_teachers=report.recall_of_teachers.get(steps),
            ms_per_image=1000 * s if (s := of("seconds_per_image", steps)) else None,  # 0: nothing was drawn
            train_seconds=report.train_seconds,
            peak_memory_bytes=report.peak_memory_bytes,
            updates=report.updates,
            updates_planned=report.updates_planned,
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
        str(row.steps) if row.steps else "-",
        _number(row.gap_closed, "{:.3f}"),
        _number(row.fd, "{:.3f}", row.fd_se),
        _number(row.kid, "{:.4f}", row.kid_se),
        _number(row.clip_score, "{:.3f}", row.clip_score_se),
        _number(row.recall, "{:.3f}") + share,
        _number(row.density, "{:.3f}"),
        _number(row.ms_per_image, "{:.1f}"),
        _number(row.train_seconds, "{:.0f} s"),
        f"{row.updates} of {row.updates_planned}" if cut else _number(row.updates, "{:.0f}"),
        _number(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, "{:.0f} MiB"),
    )


def _number(value: float | None, form: str, error: float | None = None) -> str:
    return "-" if value is None else with_error(value, error, form)


def not_told_apart(row: Row, rows: Sequence[Row]) -> list[str]:
    """Names of the other rows at this number of steps whose distance is within the standard errors of this row's: the
    difference is at most the sum of the two. Where a standard error is not known nothing is said."""
    return [
        other.name
        for other in rows
        if other is not row
        and other.steps == row.steps
        and None not in (row.fd, row.fd_se, other.fd, other.fd_se)
        and abs((row.fd or 0) - (other.fd or 0)) <= (row.fd_se or 0) + (other.fd_se or 0)
    ]


def filled(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """COLUMNS and the rows' cells, without the columns in which no row has anything."""
    lines = [COLUMNS, *(cells(row) for row in rows)]
    kept = [i for i in range(len(COLUMNS)) if i < 3 or any(line[i] != "-" for line in lines[1:])]
    return [tuple(line[i] for i in kept) for line in lines]


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns for a terminal: names to the left, numbers to the right. Below them stands whose
    distances are not told apart by their standard errors."""
    table = filled(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    for i, row in enumerate(rows):
        if better := not_told_apart(row, rows[:i]):
            at = f"{row.steps} step{'s' * (row.steps > 1)}: " if row.steps else ""
            lines.append(
                f"{at}the FD of {row.name} is not told apart from that of {', '.join(better)}: they lie within their "
                "standard errors"
            )
    return "\n".join(lines)
