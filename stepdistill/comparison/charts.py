"""Charts of a comparison: distances against steps and training time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepdistill.comparison.ranking import Row
from stepdistill.comparison.teachers import Teacher
from stepdistill.pages.dots import Dot, dot_plot
from stepdistill.pages.drawing import COLOURS
from stepdistill.pages.plots import Scale, Series, line_plot

FAR = 20.0
"""Values whose largest is so many times the smallest have a logarithmic axis; others one from 0."""
Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Steps and distances by a teacher's label, by steps."""


def charts(rows: Sequence[Row], fd: str, teachers: Sequence[Teacher]) -> str:
    """FD against steps, each teacher's dashed, and FD at each run's best step count against its training time; of more
    runs than there are colours, a line each. As HTML, empty where nothing was measured.

    Args:
        rows: that compare.
        fd: what the distance is called.
        teachers: of these runs.
    """
    own: dict[str, list[Row]] = {}
    for row in rows:
        if row.fd:
            own.setdefault(row.name, []).append(row)
    best = [min(some, key=lambda row: row.fd or 0.0) for some in own.values()]
    curves = {}
    for teacher in teachers:
        points = sorted((float(k), float(v)) for k, v in (teacher.scores.get("fd") or {}).items() if v)
        if points:
            curves[teacher.label if len(teachers) > 1 else "teacher"] = points
    drawn = _lines(best, fd, curves) if len(own) > COLOURS else _curves(own, best, fd, curves)
    return f"<div class=charts>{''.join(drawn)}</div>" if any(drawn) else ""


def _curves(own: Mapping[str, Sequence[Row]], best: Sequence[Row], fd: str, teachers: Curves) -> list[str]:
    by_steps = [_series(name, [(row.steps, row) for row in some]) for name, some in own.items()]
    time, unit = _unit(best)
    by_time = [
        _series(f"{row.name} ({_steps(row.steps)})", [(row.train_seconds / unit, row)])
        for row in best
        if row.train_seconds
    ]
    every = {row.steps for some in own.values() for row in some}
    for name, points in teachers.items():
        by_steps.append(Series(name, points, dashed=True))
        every |= {int(steps) for steps, _ in points}
    ticks = sorted(every)
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


def _lines(best: Sequence[Row], fd: str, teachers: Curves) -> list[str]:
    """A dot for each run, and the teachers at their most steps: one as a dashed line, several as dots of their own."""
    best = sorted(best, key=lambda row: (row.steps, row.fd or 0.0))
    time, unit = _unit(best)
    fds = [Dot(row.name, row.fd or 0.0, row.error_of("fd") or 0.0, _steps(row.steps)) for row in best]
    times = [Dot(row.name, (row.train_seconds or 0.0) / unit, 0.0, _steps(row.steps)) for row in best]
    note = "Bars: one standard error." if any(dot.error for dot in fds) else ""
    full = [(name, int(points[-1][0]), points[-1][1]) for name, points in teachers.items()]
    beside = (f"the {full[0][0]} in {_steps(full[0][1])}", full[0][2]) if len(full) == 1 else None
    if len(full) > 1:
        fds += [Dot(name, value, 0.0, _steps(steps)) for name, steps, value in full]
    return [
        dot_plot(fds, fd, title=f"{fd} at each run's best step count", note=note, beside=beside),
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
