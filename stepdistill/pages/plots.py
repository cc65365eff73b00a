"""Charts of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from stepdistill.pages.drawing import COLOURS, MUTED, chart, colour, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

WIDTH, HEIGHT = 400, 240
"""Of a chart, in its own units: about CSS pixels on a phone."""
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.6), (5, 1.5, 1, 1.5), (8, 2, 2, 2))
"""Of the first ten series, of the next ten in the same colours, and so on."""

Scale = Literal["linear", "zero", "log"]
"""Of an axis: as the values lie, from 0 on, or logarithmic."""


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        name: stands in the legend.
        points: (x, y), in any order; above 0 where the axis is logarithmic, others are left out.
        dashed: a thin dashed line without marks, for what is only there to compare with.
        errors: standard error of each y, drawn as a bar; empty for none.
        band: lowest and highest value around each point, drawn as a shade; empty for none.
        marks: whether each point has a mark.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    errors: Sequence[float] = ()
    band: Sequence[tuple[float, float]] = ()
    marks: bool = True


@dataclass(frozen=True)
class Phase:
    """A named stretch of x, shaded.

    Attributes:
        name: stands above it where there is room.
        start, end: of it.
    """

    name: str
    start: float
    end: float


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] = (),
    *,
    title: str = "",
    note: str = "",
    x_scale: Scale = "log",
    y_scale: Scale = "log",
    phases: Sequence[Phase] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """A chart with its legend, as HTML; an empty string where there is no point.

    Args:
        series: the curves; a curve of one point is a mark.
        x_label, y_label: under and beside the axes, with their unit.
        x_ticks: where x has ticks; by default where matplotlib sets them.
        title: a heading above it, plain text.
        note: a sentence under it, plain text.
        x_scale, y_scale: of the axes.
        phases: stretches of x; a line without marks does not go from one to the next.
        x_range: from where to where x goes; None is as the values do.
    """
    kept = [_drawn(each, x_scale == "log", y_scale == "log") for each in series]
    shown = [(place, each) for place, each in enumerate(kept) if each.points]
    if not shown:
        return ""
    svg = _svg(shown, x_label, y_label, x_ticks, x_scale, y_scale, phases, x_range)
    said = _in_words([each for _, each in shown], x_label)
    return chart(svg, title, f"{title or y_label}. {said}", _legend(shown), note)


def _drawn(each: Series, x_log: bool, y_log: bool) -> Series:
    """The series by rising x, without what a logarithmic axis cannot show."""
    points = list(each.points)
    order = sorted(
        (
            i
            for i, (x, y) in enumerate(points)
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_log) and (y > 0 or not y_log)
        ),
        key=lambda i: points[i][0],
    )
    return replace(
        each,
        points=[points[i] for i in order],
        errors=[e if 0 <= (e := each.errors[i]) < math.inf else 0.0 for i in order] if each.errors else (),
        band=[each.band[i] for i in order] if each.band else (),
    )


def _svg(
    shown: Sequence[tuple[int, Series]],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    x_scale: Scale,
    y_scale: Scale,
    phases: Sequence[Phase],
    x_range: tuple[float, float] | None,
) -> str:
    """The drawing from its ``viewBox`` attribute on."""
    with drawing(WIDTH, HEIGHT) as made:
        from matplotlib.ticker import NullLocator, StrMethodFormatter

        axes = made.axes
        for place, each in shown:
            for piece in _pieces(each, phases):
                _curve(axes, piece, place)
        if x_scale == "log":
            axes.set_xscale("log")
        if y_scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(_few_minor_labels([y for _, s in shown for _, y in s.points]))
        if x_scale == "zero":
            axes.set_xlim(left=0)
        if y_scale == "zero":
            axes.set_ylim(0, 1.06 * max(axes.get_ylim()[1], 1e-12))
        if x_ticks:
            axes.set_xticks(list(x_ticks), [f"{x:g}" for x in x_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        elif x_scale == "log":
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(_few_minor_labels([x for _, s in shown for x, _ in s.points]))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if x_range is not None:
            axes.set_xlim(*x_range)
        _shade(axes, phases)
    return made.svg


def _pieces(each: Series, phases: Sequence[Phase]) -> list[Series]:
    """The parts of a curve within each phase."""
    starts = [phase.start for phase in phases]
    places = [sum(x >= start for start in starts) for x, _ in each.points]
    cuts = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1]), len(places)]
    if each.dashed or each.marks or len(cuts) == 2:
        return [each]
    return [
        replace(each, points=each.points[a:b], errors=each.errors[a:b], band=each.band[a:b])
        for a, b in pairwise(cuts)
    ]


def _curve(axes: Axes, each: Series, place: int) -> None:
    x, y = zip(*each.points, strict=True)
    own, dashes = colour(place % COLOURS), _dashes(each, place)
    if each.band:
        low, high = zip(*each.band, strict=True)
        axes.fill_between(x, low, high, color=own, alpha=0.18, linewidth=0)
    alone = len(x) == 1
    line = axes.errorbar(
        x,
        y,
        yerr=list(each.errors) or None,
        color=own,
        linewidth=1.1 if each.dashed else 1.6,
        marker="o" if (each.marks and not each.dashed) or alone else "",
        markersize=5,
        capsize=3,
    )
    if dashes:
        line.lines[0].set_dashes(dashes)


def _dashes(each: Series, place: int) -> tuple[float, ...]:
    return (4, 3) if each.dashed else _DASHES[place // COLOURS % len(_DASHES)]


def _few_minor_labels(values: Sequence[float]) -> Formatter:
    """Labels between the powers of ten, where the values span less than two of them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    wide = max(values) / min(values) >= 100
    if wide:
        return NullFormatter()
    marks = (2, 5) if max(values) / min(values) >= 4 else (2, 3, 4, 5, 6, 7, 8)

    def label(value: float, _: int) -> str:
        return f"{value:g}" if any(f"{value:e}".startswith(f"{mark}.000") for mark in marks) else ""

    return FuncFormatter(label)


def _shade(axes: Axes, phases: Sequence[Phase]) -> None:
    """Every second stretch is shaded, and named above the axes where its name has room."""
    left, right = axes.get_xlim()
    for place, phase in enumerate(phases):
        if place % 2 == 0:
            axes.axvspan(phase.start, phase.end, color=colour(MUTED), alpha=0.12, linewidth=0)
        room = (phase.end - phase.start) / (right - left) * (WIDTH - 60)
        if len(phase.name) * 6 <= room:
            middle = (phase.start + phase.end) / 2
            transform = axes.get_xaxis_transform()
            axes.text(middle, 1.02, phase.name, transform=transform, ha="center", fontsize=9.5)
    if phases:
        axes.set_xlim(left, right)


def _in_words(series: Sequence[Series], x_label: str) -> str:
    """What the chart shows, for those who do not see it."""
    parts = []
    for each in series:
        (x, y), (last_x, last_y) = each.points[0], each.points[-1]
        text = f"{each.name}: {y:.4g} at {x_label} {x:g}"
        parts.append(text + (f", {last_y:.4g} at {last_x:g}" if len(each.points) > 1 else ""))
    return "; ".join(parts) + "."


def _legend(shown: Sequence[tuple[int, Series]]) -> list[tuple[int, str, str]]:
    if len(shown) < 2 and not shown[0][1].dashed:
        return []
    return [
        (place % COLOURS, " ".join(f"{length * 1.5:g}" for length in _dashes(each, place)), each.name)
        for place, each in shown
    ]
