"""Line plots as inline SVG, for pages that fetch nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = (
    "#0b62a4",
    "#d1495b",
    "#2e8b57",
    "#c77700",
    "#6a4c93",
    "#00838f",
    "#8d6e63",
    "#5d6d7e",
    "#ad1457",
    "#7a8b00",
)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 60, 12, 190, 44


@dataclass(frozen=True)
class Series:
    """A named curve.

    Attributes:
        name: stands in the legend.
        points: (x, y), both above 0.
        dashed: a thin dashed line without marks, for what is only there to compare with.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def line_plot(series: Sequence[Series], x_label: str, y_label: str, x_ticks: Sequence[float] = ()) -> str:
    """Curves on two logarithmic axes, with a legend; an empty string where there is no point.

    Args:
        series: the curves; a curve of one point is a mark.
        x_label, y_label: under and beside the axes.
        x_ticks: where x has ticks; by default 1, 2 and 5 times the powers of ten.
    """
    every = [point for curve in series for point in curve.points if min(point) > 0]
    if not every:
        return ""
    across = _axis([x for x, _ in every] + list(x_ticks), LEFT, WIDTH - RIGHT)
    up = _axis([y for _, y in every], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-size="12">']
    for x in x_ticks or _ticks([x for x, _ in every]):
        parts.append(
            f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>'
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>'
        )
    for y in _ticks([y for _, y in every]):
        parts.append(
            f'<path d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    turned = f'transform="rotate(-90 14 {HEIGHT / 2})"'
    parts.append(f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" {turned}>{html.escape(y_label)}</text>')
    for i, curve in enumerate(series):
        parts += _curve(curve, i, COLOURS[i % len(COLOURS)], across, up)
    return "".join(parts) + "</svg>"


def _curve(
    curve: Series, row: int, colour: str, across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    points = [(across(x), up(y)) for x, y in sorted(curve.points) if min(x, y) > 0]
    stroke = f'stroke="{colour}" stroke-width="1.5" fill="none"' + ' stroke-dasharray="5 4"' * curve.dashed
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{line}" {stroke}/>'] if len(points) > 1 else []
    if not curve.dashed:
        title = f"<title>{html.escape(curve.name)}</title>"
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>' for x, y in points
        ]
    height = TOP + 10 + 17 * row
    parts.append(f'<path d="M{WIDTH - RIGHT + 14} {height}h20" {stroke}/>')
    parts.append(f'<text x="{WIDTH - RIGHT + 40}" y="{height + 4}">{html.escape(curve.name)}</text>')
    return parts


def _axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """From a value to its place between start and end, with a margin on a logarithmic scale."""
    low, high = math.log(min(values)), math.log(max(values))
    margin = 0.06 * (high - low) or 0.5
    low, high = low - margin, high + margin
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten within the values' range; even steps where that gives fewer than three, and the
    range's ends where there are none."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [
        mark * 10.0**power for power in powers for mark in (1, 2, 5) if low <= mark * 10.0**power <= high
    ]
    if len(found) < 3 and high > low:
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(mark * power for mark in (1, 2, 5, 10) if mark * power >= rough)
        found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found if len(found) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})
