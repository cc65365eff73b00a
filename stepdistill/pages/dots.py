"""Charts of one number each of many: a line for each name, so that forty are read as well as four."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill.pages.drawing import COLOURS, MUTED, chart, colour, drawing
from stepdistill.pages.plots import WIDTH

ROW, AXIS = 13, 44
"""Height of a line, and of the axis with its label."""


@dataclass(frozen=True)
class Dot:
    """A number.

    Attributes:
        name: stands to its left.
        value: where its mark is.
        error: its standard error, drawn as a bar; 0 for none.
        kind: those of one kind have one colour; empty where there are none.
    """

    name: str
    value: float
    error: float = 0.0
    kind: str = ""


def dot_plot(
    dots: Sequence[Dot],
    x_label: str,
    *,
    title: str = "",
    note: str = "",
    beside: tuple[str, float] | None = None,
) -> str:
    """A chart of numbers by their names, the first at the top, on an axis from 0 (or below, where one is), as HTML; an
    empty string where there is none.

    Args:
        dots: what it shows; those that are not finite are left out.
        x_label: under the axis, with its unit.
        title: a heading above it, plain text.
        note: a sentence under it, plain text.
        beside: a name and a number that all are to be compared with: a dashed line.
    """
    dots = [dot for dot in dots if math.isfinite(dot.value)]
    if not dots:
        return ""
    kinds = list(dict.fromkeys(dot.kind for dot in dots))
    with drawing(WIDTH, ROW * len(dots) + AXIS) as made:
        axes = made.axes
        for place, dot in enumerate(dots):
            own = colour(kinds.index(dot.kind) % COLOURS)
            error = dot.error if 0 < dot.error < math.inf else None
            axes.errorbar([dot.value], [place], xerr=error, color=own, marker="o", markersize=4, capsize=2)
        axes.set_yticks(range(len(dots)), [dot.name for dot in dots], fontsize=9)
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        if beside is not None and math.isfinite(beside[1]):
            axes.axvline(beside[1], color=colour(MUTED), linewidth=1.1, linestyle="--")
        left, right = axes.get_xlim()
        axes.set_xlim(left if any(dot.value < 0 for dot in dots) else 0, 1.04 * max(right, 1e-12))
        axes.set_xlabel(x_label)
    legend = [(kinds.index(kind) % COLOURS, "", kind) for kind in kinds if kind]
    said = [f"{dot.name}{f', {dot.kind}' * bool(dot.kind)}: {dot.value:.4g}" for dot in dots]
    if beside is not None:
        said.append(f"{beside[0]}: {beside[1]:.4g}")
        note = f"Dashed: {beside[0]}. {note}".strip()
    return chart(made.svg, title, f"{title or x_label}. {'; '.join(said)}.", legend, note)
