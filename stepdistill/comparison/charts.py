"""Charts of a comparison: distances against steps and training time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.comparison.ranking import Row, ranked_by
from stepdistill.comparison.teachers import Teacher
from stepdistill.pages.dots import Dot, dot_plot
from stepdistill.pages.drawing import COLOURS
from stepdistill.pages.plots import Scale, Series, line_plot

FAR = 20.0
"""Values whose largest is so many times the smallest have a logarithmic axis; others one from 0."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Steps and distances by a teacher's label, by steps."""


@dataclass(frozen=True)
class Point:
    """A row with the distance that is drawn."""

    row: Row
    distance: float
    error: float


def charts(rows: Sequence[Row], metrics: Mapping[str, Any], teachers: Sequence[Teacher]) -> str:
    """The distance that ranks (see :func:`ranked_by`) against steps, each teacher's dashed, and at each run's best step
    count against its training time; of more runs than there are colours, a line each. As HTML, empty where nothing was
    measured.

    Args:
        rows: that compare.
        metrics: what distances are called.
        teachers: of these runs.
    """
    by = ranked_by(rows)
    distance = metrics.get(by) or by.removeprefix("second_").upper()
    points = [
        Point(row, getattr(row, by), row.error_of(by) or 0.0) for row in rows if getattr(row, by) is not None
    ]
    own: dict[str, list[Point]] = {}
    for point in points:
        own.setdefault(point.row.name, []).append(point)
    best = [min(some, key=lambda point: point.distance) for some in own.values()]
    curves = {}
    for teacher in teachers:
        known = (teacher.scores.get(by) or {}).items()
        if curve := sorted((float(k), float(v)) for k, v in known if v is not None):
            curves[teacher.label if len(teachers) > 1 else "teacher"] = curve
    drawn = _lines(best, distance, curves) if len(own) > COLOURS else _curves(own, best, distance, curves)
    return f"<div class=charts>{''.join(drawn)}</div>" if any(drawn) else ""


def _curves(
    own: Mapping[str, Sequence[Point]], best: Sequence[Point], distance: str, teachers: Curves
) -> list[str]:
    by_steps = [_series(name, [(point.row.steps, point) for point in some]) for name, some in own.items()]
    time, unit = _unit(best)
    by_time = [
        _series(f"{point.row.name} ({_steps(point.row.steps)})", [(point.row.train_seconds / unit, point)])
        for point in best
        if point.row.train_seconds
    ]
    every = {point.row.steps for some in own.values() for point in some}
    for name, points in teachers.items():
        by_steps.append(Series(name, points, dashed=True))
        every |= {int(steps) for steps, _ in points}
    ticks = sorted(every)
    note = "Bars: one standard error." if any(series.errors for series in by_steps) else ""
    title = f"{distance} against"
    return [
        line_plot(
            by_steps, "steps", distance, ticks, title=f"{title} steps", note=note, y_scale=_scale(by_steps, 1)
        ),
        line_plot(
            by_time,
            time,
            distance,
            title=f"{title} training time",
            note=note,
            x_scale=_scale(by_time, 0),
            y_scale=_scale(by_time, 1),
        ),
    ]


def _lines(best: Sequence[Point], distance: str, teachers: Curves) -> list[str]:
    """A dot for each run, and the teachers at their most steps: one as a dashed line, several as dots of their own."""
    best = sorted(best, key=lambda point: (point.row.steps, point.distance))
    time, unit = _unit(best)
    distances = [Dot(each.row.name, each.distance, each.error, _steps(each.row.steps)) for each in best]
    times = [
        Dot(each.row.name, (each.row.train_seconds or 0.0) / unit, 0.0, _steps(each.row.steps))
        for each in best
    ]
    note = "Bars: one standard error." if any(dot.error for dot in distances) else ""
    full = [(name, int(points[-1][0]), points[-1][1]) for name, points in teachers.items()]
    beside = (f"the {full[0][0]} in {_steps(full[0][1])}", full[0][2]) if len(full) == 1 else None
    if len(full) > 1:
        distances += [Dot(name, value, 0.0, _steps(steps)) for name, steps, value in full]
    return [
        dot_plot(
            distances, distance, title=f"{distance} at each run's best step count", note=note, beside=beside
        ),
        dot_plot(times, time, title="Training time") if any(dot.value for dot in times) else "",
    ]


def _unit(points: Sequence[Point]) -> tuple[str, int]:
    """What an axis of training times says, and how many seconds its unit has."""
    long = max((point.row.train_seconds or 0 for point in points), default=0) > 120
    return ("training, minutes", 60) if long else ("training, seconds", 1)


def _steps(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def _series(name: str, points: Sequence[tuple[float, Point]]) -> Series:
    errors = [point.error for _, point in points]
    return Series(name, [(x, point.distance) for x, point in points], errors=errors if any(errors) else ())


def _scale(series: Sequence[Series], axis: int) -> Scale:
    values = [point[axis] for each in series for point in each.points]
    if values and min(values) < 0:  # as a kernel distance without bias may be
        return "linear"
    return "log" if values and max(values) > FAR * min(values) > 0 else "zero"
