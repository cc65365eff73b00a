"""Charts of one number each: a line a name, where its mark lies, what its colour says."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from stepdistill.pages.dots import Dot, dot_plot


def marks_of(plot: str) -> list[tuple[float, float, str]]:
    """Centres and colours of the marks, in the chart's units."""
    found = re.findall(r'<use href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--(c\d)\)', plot)
    return [(float(x), float(y), colour) for x, y, colour in found]


def test_each_name_has_a_line_and_equal_differences_are_equal_lengths() -> None:
    dots = [Dot(f"run {i}", 1.0 + i, 0.0, "1 step" if i < 2 else "4 steps") for i in range(4)]
    plot = dot_plot(dots, "FD", title="FD of <x>", beside=("the teacher", 0.5), note="Bars: errors.")
    names = [text for text in re.findall(r">([^<>]*)</text>", plot) if text.startswith("run")]
    assert names == [dot.name for dot in dots]
    centres = marks_of(plot)
    assert [colour for _, _, colour in centres] == ["c0", "c0", "c1", "c1"]
    for axis in (0, 1):
        gaps = [after[axis] - before[axis] for before, after in pairwise(centres)]
        assert gaps[0] > 8 and gaps == pytest.approx([gaps[0]] * 3, abs=1e-2)  # the first name is at the top
    said = "run 0, 1 step: 1; run 1, 1 step: 2; run 2, 4 steps: 3; run 3, 4 steps: 4; the teacher: 0.5."
    assert f'aria-label="FD of &lt;x&gt;. {said}"' in plot
    assert re.findall(r"</svg>([^<]*)</li>", plot) == ["1 step", "4 steps"]
    assert "Dashed: the teacher. Bars: errors.</p>" in plot


def test_bars_are_one_error_to_each_side() -> None:
    plot = dot_plot([Dot("a", 2.0, 0.5), Dot("b", 3.0)], "x")
    (low, line, _), (high, *_), (a, *_), (b, *_) = marks_of(plot)
    assert (a - low, high - a) == pytest.approx(((b - a) / 2,) * 2, abs=1e-2) and line < marks_of(plot)[3][1]


def test_a_chart_grows_with_what_it_shows_and_leaves_out_what_it_cannot() -> None:
    def height(count: int) -> float:
        plot = dot_plot([Dot(str(i), i + 1.0) for i in range(count)], "x")
        return float(re.findall(r'viewBox="0 0 \d+ (\d+)"', plot)[0])

    assert height(40) - height(20) == pytest.approx(height(60) - height(40)) and height(40) > 1.6 * height(20)
    plot = dot_plot([Dot("a", math.nan), Dot("b", 0.0), Dot("c", 2.0)], "x")
    assert len(marks_of(plot)) == 2 and ">c</text>" in plot and ">a</text>" not in plot
    assert dot_plot([], "x") == "" == dot_plot([Dot("a", math.inf)], "x")
