"""Charts: where points lie, what is written, what a page can style and a screen reader say."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from stepdistill.pages.plots import HEIGHT, WIDTH, Phase, Series, line_plot


def line_of(plot: str, colour: int) -> list[tuple[float, float]]:
    """The corners of the line of one colour, in the chart's units."""
    path = next(
        path
        for path in re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--c{colour}\)', plot)
        if path.count("L") > 1
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_equal_ratios_are_equal_lengths_on_logarithmic_axes() -> None:
    """1, 2, 4, 8 are evenly spaced, and y falls by one length for each halving."""
    plot = line_plot([Series("<a>", [(8, 1.0), (1, 8.0), (2, 4.0), (4, 2.0)])], "steps", "FD", (1, 2, 4, 8))
    points = line_of(plot, 0)
    assert len(points) == 4
    for axis in (0, 1):
        gaps = [after[axis] - before[axis] for before, after in pairwise(points)]
        assert max(gaps) - min(gaps) < 1e-3 and min(gaps) > 20  # y grows downwards
    assert all(f">{tick}</text>" in plot for tick in (1, 2, 4, 8))


def test_equal_differences_are_equal_lengths_on_linear_ones_and_zero_is_on_the_axis() -> None:
    plot = line_plot(
        [Series("a", [(0, 1.0), (1, 2.0), (2, 3.0)])], "x", "y", x_scale="linear", y_scale="zero"
    )
    (left, bottom), _, (right, top) = points = line_of(plot, 0)
    assert points[1] == pytest.approx(((left + right) / 2, (bottom + top) / 2), abs=1e-3)
    zero = float(re.findall(r' y="([\d.]+)"[^>]*>0(?:\.0)?<', plot)[-1])  # of the tick
    assert zero == pytest.approx(bottom + (bottom - top) / 2, abs=8)


def test_a_chart_is_styled_by_its_page_alone() -> None:
    """No colour, font, address or name of its own; two charts share no name."""
    series = [Series("a", [(1, 1.0), (2, 2.0)], errors=[0.1, 0.2]), Series("b", [(1, 2.0)], dashed=True)]
    plot = line_plot(series, "x", "y", phases=[Phase("warm start", 1, 2)])
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|https?:|<metadata|<style|xlink", plot)
    assert {"--c0", "--c1", "--ink", "--muted", "--line"} <= set(re.findall(r"var\((--\w+)\)", plot))
    names = set(re.findall(r' id="([^"]*)"', plot))
    used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', plot))
    assert names and {one or other for one, other in used} <= names
    other = line_plot(series, "x", "z")
    assert not names & set(re.findall(r' id="([^"]*)"', other))
    assert line_plot(series, "x", "y", phases=[Phase("warm start", 1, 2)]) == plot


def test_a_chart_says_what_it_shows() -> None:
    series = [Series("<a>", [(2, 0.25), (1, 0.5)]), Series("$b$ & c", [(1, 0.125)], dashed=True)]
    plot = line_plot(series, "update", "loss", title="Loss of <x>", note="one > two", x_scale="linear")
    label = "Loss of &lt;x&gt;. &lt;a&gt;: 0.5 at update 1, 0.25 at 2; $b$ &amp; c: 0.125 at update 1."
    assert f'role=img aria-label="{label}"' in plot
    assert "<figcaption>Loss of &lt;x&gt;</figcaption>" in plot and "one &gt; two</p>" in plot
    assert re.findall(r"</svg>([^<]*)</li>", plot) == ["&lt;a&gt;", "$b$ &amp; c"]
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in plot
    assert line_plot([Series("none", [])], "x", "y") == "" == line_plot([Series("a", [(1, -1.0)])], "x", "y")


def test_phases_are_shaded_and_named_where_there_is_room() -> None:
    phases = [Phase("warm start", 0, 60), Phase("fake score alone", 60, 64), Phase("matching", 64, 100)]
    series = [Series("a", [(float(x), 1.0 + x) for x in range(101)], marks=False)]
    plot = line_plot(series, "update", "loss", x_scale="linear", phases=phases)
    assert ">warm start</text>" in plot and ">matching</text>" in plot and ">fake score alone<" not in plot
    assert plot.count("opacity: 0.12") == 2
