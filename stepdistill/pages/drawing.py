"""Drawings by matplotlib as inline SVG: their text is text and their colours are the page's CSS variables, so that one
file is read in dark and in light. matplotlib is imported when one is made."""

from __future__ import annotations

import hashlib
import html
import io
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 10
"""Series colours of the style sheet, ``--c0`` to ``--c9``."""
INK, MUTED, LINE = 0x40, 0x41, 0x42
_NAMED = {INK: "ink", MUTED: "muted", LINE: "line"}
PAD = 3
"""Units between the edge of a drawing and what is written in it."""
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are the process's


class Drawing:
    """One pair of axes.

    Attributes:
        axes: to draw on.
        svg: the drawing from its ``viewBox`` attribute on, once it is done.
    """

    axes: Axes
    svg: str


def colour(number: int) -> str:
    """A colour that stands for a variable of the style sheet while matplotlib draws: a series' number, INK, MUTED or
    LINE."""
    return f"#f0f0{number:02x}"


@contextmanager
def drawing(width: int, height: int) -> Iterator[Drawing]:
    """Axes to draw on, so many units wide and high with their labels; done at the end of the block."""
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # says that it looks for fonts, once
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

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
        **dict.fromkeys(("text.color", "axes.labelcolor"), colour(INK)),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), colour(MUTED)),
        "grid.color": colour(LINE),
    }
    made = Drawing()
    with _ONE_AT_A_TIME, matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        # About where they will be, as ticks depend on it.
        made.axes = figure.add_axes((54 / width, 36 / height, 1 - 60 / width, 1 - 46 / height))
        yield made
        _fill(made.axes, width, height)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    made.svg = f'viewBox="0 0 {width} {height}">{_for_a_page(file.getvalue())}'


def _fill(axes: Axes, width: int, height: int) -> None:
    """Gives the axes all the room that their labels leave. matplotlib's own layouts measure these twice."""
    own, whole = axes.get_window_extent(), axes.get_tightbbox(for_layout_only=True)
    assert whole is not None
    left, bottom = PAD + own.x0 - whole.x0, PAD + own.y0 - whole.y0
    right, top = width - PAD - (whole.x1 - own.x1), height - PAD - (whole.y1 - own.y1)
    axes.set_position((left / width, bottom / height, (right - left) / width, (top - bottom) / height))


def _variable(found: re.Match[str]) -> str:
    number = int(found[1], 16)
    return f"var(--{_NAMED.get(number, f'c{number}')})"


def _for_a_page(svg: str) -> str:
    """What is in a file of matplotlib's. Names that one drawing uses of another's become its own, and what a page says
    by itself is left out."""
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)  # but for clip paths and marks
    svg = re.sub(r'(id="|url\(#|href="#)(?=[pm][0-9a-f]{10})', rf"\g<1>g{own}", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"#f0f0([0-9a-f]{2})", _variable, svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    return svg[svg.index(">") + 1 :].strip()


def chart(
    svg: str, title: str, said: str, legend: Sequence[tuple[int, str, str]] = (), note: str = ""
) -> str:
    """A drawing with what stands around it, as HTML.

    Args:
        svg: of a Drawing.
        title: a heading above it; empty for none. All texts are plain.
        said: what it shows, for those who do not see it.
        legend: colours, dashes as SVG has them, and names.
        note: a sentence under it.
    """
    items = "".join(
        f"<li><svg class=key viewBox='0 0 26 12' aria-hidden=true>"
        f'<path d="M0 6h26" stroke="var(--c{number})" stroke-width=2 stroke-dasharray="{dashes}"/></svg>'
        f"{html.escape(name)}</li>"
        for number, dashes, name in legend
    )
    return (
        "<figure class=chart>"
        + (f"<figcaption>{html.escape(title)}</figcaption>" if title else "")
        + f'<svg role=img aria-label="{html.escape(said)}" {svg}'
        + (f"<ul class=legend>{items}</ul>" if items else "")
        + (f"<p class=note>{html.escape(note)}</p>" if note else "")
        + "</figure>"
    )
