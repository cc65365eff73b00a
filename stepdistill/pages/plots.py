"""Charts by matplotlib as inline SVG: their text is text and their colours are the page's CSS variables, so that one
file is read in dark and in light. matplotlib is imported when a chart is drawn."""

from __future__ import annotations

import hashlib
import html
import io
import logging
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Formatter

COLOURS = 10
"""Series colours of the style sheet, ``--c0`` to ``--c9``; further series are dashed in the same ones."""
WIDTH, HEIGHT = 400, 240
"""Of a chart, in its own units: about CSS pixels on a phone."""
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.6), (5, 1.5, 1, 1.5), (8, 2, 2, 2))
_NAMED = {0x40: "ink", 0x41: "muted", 0x42: "line"}
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are the process's

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
    drawing = _svg(shown, x_label, y_label, x_ticks, x_scale, y_scale, phases, x_range)
    said = _in_words([each for _, each in shown], x_label)
    named = f"{title or y_label}. {said}"
    caption = f"<figcaption>{html.escape(title)}</figcaption>" if title else ""
    under = f"<p class=note>{html.escape(note)}</p>" if note else ""
    picture = f'<svg role=img aria-label="{html.escape(named)}" {drawing}'
    return f"<figure class=chart>{caption}{picture}{_legend(shown)}{under}</figure>"


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
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # says that it looks for fonts, once
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "stepdistill",
        "text.parse_math": False,
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": False,
        **dict.fromkeys(("text.color", "axes.labelcolor"), _code(0x40)),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _code(0x41)),
        "grid.color": _code(0x42),
    }
    with _ONE_AT_A_TIME, matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
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
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_a_page(file.getvalue())


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
    colour, dashes = _code(place % COLOURS), _dashes(each, place)
    if each.band:
        low, high = zip(*each.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    alone = len(x) == 1
    line = axes.errorbar(
        x,
        y,
        yerr=list(each.errors) or None,
        color=colour,
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
            axes.axvspan(phase.start, phase.end, color=_code(0x41), alpha=0.12, linewidth=0)
        room = (phase.end - phase.start) / (right - left) * (WIDTH - 60)
        if len(phase.name) * 6 <= room:
            middle = (phase.start + phase.end) / 2
            transform = axes.get_xaxis_transform()
            axes.text(middle, 1.02, phase.name, transform=transform, ha="center", fontsize=9.5)
    if phases:
        axes.set_xlim(left, right)


def _code(number: int) -> str:
    """A colour that stands for a variable of the style sheet while matplotlib draws."""
    return f"#f0f0{number:02x}"


def _variable(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return f"var(--{_NAMED.get(number, f'c{number}')})"


def _for_a_page(drawing: str) -> str:
    """Of a file of matplotlib's: what stands inside a page, from the attribute ``viewBox`` on. Names that one drawing
    uses of another's become its own, and what a page says by itself is left out."""
    own = hashlib.sha256(drawing.encode()).hexdigest()[:8]
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", drawing)  # but for clip paths and marks
    drawing = re.sub(r'(id="|url\(#|href="#)(?=[pm][0-9a-f]{10})', rf"\g<1>g{own}", drawing)
    drawing = drawing.replace("xlink:href", "href")
    drawing = re.sub(r" font-family: [^;]*;", "", drawing)
    drawing = re.sub(r"#f0f0([0-9a-f]{2})", _variable, drawing)
    drawing = re.sub(r"\s+", " ", drawing).replace("> <", "><")
    body = drawing[drawing.index(">") + 1 :].strip()
    return f'viewBox="0 0 {WIDTH} {HEIGHT}">{body}'


def _in_words(series: Sequence[Series], x_label: str) -> str:
    """What the chart shows, for those who do not see it."""
    parts = []
    for each in series:
        (x, y), (last_x, last_y) = each.points[0], each.points[-1]
        text = f"{each.name}: {y:.4g} at {x_label} {x:g}"
        parts.append(text + (f", {last_y:.4g} at {last_x:g}" if len(each.points) > 1 else ""))
    return "; ".join(parts) + "."


def _legend(shown: Sequence[tuple[int, Series]]) -> str:
    if len(shown) < 2 and not shown[0][1].dashed:
        return ""
    items = []
    for place, each in shown:
        dashes = " ".join(f"{length * 1.5:g}" for length in _dashes(each, place))
        line = f'<path d="M0 6h26" stroke="var(--c{place % COLOURS})" stroke-width=2 stroke-dasharray="{dashes}"/>'
        items.append(
            f"<li><svg class=key viewBox='0 0 26 12' aria-hidden=true>{line}</svg>{html.escape(each.name)}</li>"
        )
    return f"<ul class=legend>{''.join(items)}</ul>"
