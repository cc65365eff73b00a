"""Charts of a comparison: distances against steps and training time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.comparison.ranking import Row
from stepdistill.pages.dots import Dot, dot_plot
from stepdistill.pages.drawing import COLOURS
from stepdistill.pages.plots import Scale, Series, line_plot

FAR = 20.0
"""Values whose largest is so many times the smallest have a logarithmic axis; others one from 0."""


def charts(rows: Sequence[Row], fd: str, teacher: Mapping[str, Any]) -> str:
    """FD against steps, the teacher's dashed, and FD at each run's best step count against its training time; of more
    runs than there are colours, a line each. As HTML, empty where nothing was measured.

    Args:
        rows: that compare.
        fd: what the distance is called.
        teacher: its distances by step count.
    """
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row.fd:
            own.setdefault(row.name, []).append(row)
    best = [min(some, key=lambda row: row.fd or 0.0) for some in own.values()]
    points = sorted((float(steps), float(score)) for steps, score in teacher.items() if score)
    drawn = _lines(best, fd, points) if len(own) > COLOURS else _curves(own, best, fd, points)
    return f"<div class=charts>{''.join(drawn)}</div>" if any(drawn) else ""


def _curves(
    own: Mapping[str, Sequence[Row]], best: Sequence[Row], fd: str, teacher: Sequence[tuple[float, float]]
) -> list[str]:
    by_steps = [_series(name, [(row.steps, row) for row in some]) for name, some in own.items()]
    time, unit = _unit(best)
    by_time = [
        _series(f"{row.name} ({_steps(row.steps)})", [(row.train_seconds / unit, row)])
        for row in best
        if row.train_seconds
    ]
    ticks = sorted({row.steps for some in own.values() for row in some} | {steps for steps, _ in teacher})
    if teacher:
        by_steps.append(Series("teacher", teacher, dashed=True))
    note = "Bars: one standard error." if any(series.errors for series in by_steps) else ""
    return [
        line_plot(by_steps, "steps", fd, ticks, title=f"{fd} against steps", note=note, y_scale=_scale(by_steps, 1)),
        line_plot(
            by_time,
            time,
            fd,
            title=f"{fd} against training time",
            note=note,
            x_scale=_scale(by_time, 0),
            y_scale=_scale(by_time, 1),
        ),
    ]  # fmt: skip


def _lines(best: Sequence[Row], fd: str, teacher: Sequence[tuple[float, float]]) -> list[str]:
    best = sorted(best, key=lambda row: (row.steps, row.fd or 0.0))
    time, unit = _unit(best)
    fds = [Dot(row.name, row.fd or 0.0, row.error_of("fd") or 0.0, _steps(row.steps)) for row in best]
    times = [Dot(row.name, (row.train_seconds or 0.0) / unit, 0.0, _steps(row.steps)) for row in best]
    note = "Bars: one standard error." if any(dot.error for dot in fds) else ""
    full = (f"the teacher in {_steps(int(teacher[-1][0]))}", teacher[-1][1]) if teacher else None
    return [
        dot_plot(fds, fd, title=f"{fd} at each run's best step count", note=note, beside=full),
        dot_plot(times, time, title="Training time") if any(dot.value for dot in times) else "",
    ]


def _unit(rows: Sequence[Row]) -> tuple[str, int]:
    """What an axis of training times says, and how many seconds its unit has."""
    long = max((row.train_seconds or 0 for row in rows), default=0) > 120
    return ("training, minutes", 60) if long else ("training, seconds", 1)


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _series(name: str, points: Sequence[tuple[float, Row]]) -> Series:
    errors = [row.error_of("fd") or 0.0 for _, row in points]
    return Series(name, [(x, row.fd or 0.0) for x, row in points], errors=errors if any(errors) else ())


def _scale(series: Sequence[Series], axis: int) -> Scale:
    values = [point[axis] for each in series for point in each.points]
    return "log" if values and max(values) > FAR * min(values) > 0 else "zero"
