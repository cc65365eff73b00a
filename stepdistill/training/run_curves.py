"""The curves of a run, from the rows of its stats.jsonl: losses by network, health, gradients, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any

from stepdistill.pages.plots import Phase, Scale, Series, line_plot
from stepdistill.training.signs import PREFIX, SIGNS

POINTS = 200
"""Of a curve at most; each is then a mean, in a shade from the lowest to the highest."""
OTHERS = 12
"""Charts of what a method logs of its own, at most."""
NETWORKS = 12
"""Of which there are charts; no method has as many."""
_KNOWN = {
    *("update", "network", "phase", "loss", "lr", "seconds", "grad_norm", "memory_bytes", "worries"),
    *("diversity", "teacher_diversity", "saturation", "teacher_saturation"),
}
Rows = Sequence[Mapping[str, Any]]


def phases_of(rows: Rows, updates: int = 0) -> list[Phase]:
    """The stretches that the method named, in order; none where it named one alone.

    Args:
        rows: of stats.jsonl.
        updates: of the whole run, where the last stretch ends at the earliest.
    """
    found = [
        (name, [int(row["update"]) for row in group])
        for name, group in groupby(rows, lambda row: str(row.get("phase") or ""))
    ]
    if not found:
        return []
    ends = [*(places[0] for _, places in found[1:]), max(updates, found[-1][1][-1] + 1)]
    phases = [
        Phase(name or "unnamed", places[0], end) for (name, places), end in zip(found, ends, strict=True)
    ]
    return phases if len(phases) > 1 else []


@dataclass(frozen=True)
class _Ground:
    """What all charts of a run stand on.

    Attributes:
        rows: of stats.jsonl.
        phases: of the run.
        end: its last update.
    """

    rows: Rows
    phases: Sequence[Phase]
    end: float

    @staticmethod
    def of(rows: Rows, updates: int) -> _Ground:
        return _Ground(
            rows, phases_of(rows, updates), max([updates, *(row["update"] + 1 for row in rows[-1:])])
        )

    @property
    def networks(self) -> list[str]:
        return list(dict.fromkeys(str(row.get("network")) for row in self.rows))[:NETWORKS]

    def plot(self, series: Sequence[Series], unit: str, title: str, scale: Scale, note: str = "") -> str:
        return line_plot(
            series,
            "update",
            unit,
            title=title,
            note=note,
            x_scale="linear",
            y_scale=scale,
            phases=self.phases,
            x_range=(0.0, self.end),
        )


def curves(rows: Rows, updates: int = 0) -> list[str]:
    """Charts as HTML, those that everyone asks for.

    Args:
        rows: of stats.jsonl.
        updates: of the whole run.
    """
    ground = _Ground.of(rows, updates)
    charts = (
        *_losses(ground),
        _beside_the_teacher(ground, "diversity", "pixel difference", "Diversity", DIVERSITY),
        _beside_the_teacher(ground, "saturation", "share of values", "Saturation", SATURATION),
        *_looks(ground),
        _by_network(ground, "grad_norm", "norm", "Gradient norm", "log"),
        _time(ground),
        _memory(ground),
    )
    return [chart for chart in charts if chart]


DIVERSITY = "How much pictures of different prompts differ. Below half of the teacher's: collapse."
SATURATION = "Values that are black or white. Far above the teacher's: oversaturation."


def further_curves(rows: Rows, updates: int = 0) -> list[str]:
    """Charts as HTML of what else the method logged, and of the learning rate."""
    ground = _Ground.of(rows, updates)
    names = dict.fromkeys(
        key
        for row in rows
        for key, value in row.items()
        if _number(value) and key not in _KNOWN and not key.startswith(PREFIX)
    )
    charts = [_by_network(ground, name, name, name, "linear") for name in list(names)[:OTHERS]]
    return [chart for chart in (*charts, _by_network(ground, "lr", "rate", "Learning rate", "log")) if chart]


def numbers_of_curves(rows: Rows, count: int = 12) -> tuple[list[str], list[list[str]]]:
    """The curves as a table for those who do not see them: head and rows, one a stretch of updates."""
    keys = ["loss", "grad_norm", "diversity", "saturation"]
    networks = list(dict.fromkeys(str(row.get("network")) for row in rows))[:NETWORKS]
    columns = [(key, name) for key in keys for name in networks if _points(rows, key, name)]
    size = max(1, -(-len(rows) // count))
    lines = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        cells = [f"{int(part[0]['update']) + 1:,} to {int(part[-1]['update']) + 1:,}"]
        for key, name in columns:
            found = [y for _, y in _points(part, key, name)]
            cells.append(f"{fmean(found):.4g}" if found else "-")
        lines.append(cells)
    return ["updates", *(f"{key.replace('_', ' ')}, {name}" for key, name in columns)], lines


def _losses(ground: _Ground) -> list[str]:
    """One chart a network, as each has a loss of its own."""
    charts = []
    for name in ground.networks:
        points = _points(ground.rows, "loss", name)
        said = _ends(points, ground.phases)
        more = ". Each phase has a loss of its own: compare within one." if len(said) > 1 else "."
        scale: Scale = _scale([y for _, y in points]) if points else "linear"
        title = f"Loss of the {name}"
        charts.append(
            ground.plot(
                [_curve(name, points, ground.phases)], "loss", title, scale, f"{'; '.join(said)}{more}"
            )
        )
    return charts


def _ends(points: Sequence[tuple[float, float]], phases: Sequence[Phase]) -> list[str]:
    """What the loss was at the start and the end of each phase: means over a twentieth of it."""
    found = []
    for phase in phases or [Phase("", 0, float("inf"))]:
        inner = [y for x, y in points if phase.start <= x < phase.end]
        if inner:
            few = max(1, len(inner) // 20)
            named = f"{phase.name}: " if phase.name else ""
            found.append(
                f"{named}{fmean(inner[:few]):.3g} at its start, {fmean(inner[-few:]):.3g} at its end"
            )
    return found


def _beside_the_teacher(ground: _Ground, key: str, unit: str, title: str, note: str) -> str:
    """What the previews said, the teacher's dashed."""
    own, other = (
        [(float(row["update"] + 1), float(row[name])) for row in ground.rows if _number(row.get(name))]
        for name in (key, f"teacher_{key}")
    )
    if other:  # the same pictures all the time
        other = [(0.0, other[0][1]), (ground.end, other[-1][1])]
    series = [Series("student", own), Series("teacher", other, dashed=True)]
    return ground.plot(series, unit, title, "zero", note) if own else ""


LOOKS: Sequence[tuple[str, str, str, Mapping[str, str], float | None]] = (
    (
        "Lag of the follower",
        "its error over the teacher's",
        "On the student's samples. It should be below 1, as it learns them.",
        {"lag": "all", "lag_low": "low noise", "lag_middle": "middle noise", "lag_high": "high noise"},
        SIGNS["lag"].bound,
    ),
    (
        "Field over its normaliser",
        "ratio",
        "How far follower and teacher are apart, over how far the student is from what the teacher sees.",
        {"field_low": "low noise", "field_middle": "middle noise", "field_high": "high noise"},
        None,
    ),
    (
        "The student's way",
        "cosine",
        "Between where the student went and where the teacher would have it. Above 0 on average.",
        {"towards": "student"},
        SIGNS["away"].bound,
    ),
    (
        "Latents beside the teacher's",
        "ratio",
        "1 is as the teacher's. Of few samples.",
        {
            "diversity_of_prompts": "diversity of prompts",
            "diversity_of_noises": "diversity of one prompt",
            "latent_deviation": "deviation",
            "high_frequencies": "high frequencies",
            "motion": "motion",
        },
        None,
    ),
    (
        "Latents off the teacher's",
        "share",
        "The mean's distance in deviations, and the share of values where 1% of the teacher's lie.",
        {"latent_mean": "mean", "extremes": "extreme values"},
        None,
    ),
    (
        "Guided predictions",
        "deviation over the usual",
        "Far above 1: guidance oversaturates.",
        {"guided_low": "low noise", "guided_middle": "middle noise", "guided_high": "high noise"},
        SIGNS["guidance"].bound,
    ),
)
"""Charts of the looks at a run: title, unit, note, the lines by their key, and the bound that is drawn."""


def _looks(ground: _Ground) -> list[str]:
    """What the looks saw: one chart each of LOOKS, and of all that is named after a network."""
    charts = []
    for title, unit, note, lines, bound in LOOKS:
        series = [Series(name, found) for key, name in lines.items() if (found := _of_look(ground, key))]
        if series and bound is not None:
            series.append(Series("bound", [(0.0, bound), (ground.end, bound)], dashed=True))
        charts.append(ground.plot(series, unit, title, "linear", note) if series else "")
    kinds = {
        "moved_": (
            "Update over weights",
            "share an update",
            "How far an update moves a network, over its weights.",
        ),
        "gradient_noise_": ("Gradient noise", "ratio", "Spread of the gradient norm over its median."),
    }
    for kind, (title, unit, note) in kinds.items():
        start = PREFIX + kind
        names = list(dict.fromkeys(key for row in ground.rows for key in row if key.startswith(start)))[
            :NETWORKS
        ]
        series = [
            Series(key.removeprefix(start).replace("_", " "), _of_look(ground, key.removeprefix(PREFIX)))
            for key in names
        ]
        charts.append(ground.plot(series, unit, title, "linear", note) if series else "")
    return charts


def _of_look(ground: _Ground, key: str) -> list[tuple[float, float]]:
    name = PREFIX + key
    return [(float(row["update"] + 1), float(row[name])) for row in ground.rows if _number(row.get(name))]


def _by_network(ground: _Ground, key: str, unit: str, title: str, scale: Scale, factor: float = 1.0) -> str:
    series = [
        _curve(name, [(x, y * factor) for x, y in _points(ground.rows, key, name)], ground.phases)
        for name in ground.networks
    ]
    return ground.plot(series, unit, title, scale)


def _memory(ground: _Ground) -> str:
    """The most that was held so far."""
    rows = [row for row in ground.rows if _number(row.get("memory_bytes"))]
    points = [(float(row["update"]), row["memory_bytes"] / 2**30) for row in rows]
    return ground.plot([_curve("memory", points, ())], "GiB", "Memory at the peak", "zero")


def _time(ground: _Ground) -> str:
    """Of an update, by the run's clock; the one after a preview is left out, as it has the time of its pictures."""
    taken = [
        (str(row.get("network")), float(row["update"]), row["seconds"] - before["seconds"])
        for before, row in pairwise(ground.rows)
        if _number(row.get("seconds")) and _number(before.get("seconds")) and "diversity" not in before
    ]
    factor, unit = (1000.0, "ms") if max((y for _, _, y in taken), default=0.0) < 2 else (1.0, "s")
    series = [
        _curve(name, [(x, y * factor) for own, x, y in taken if own == name], ground.phases)
        for name in ground.networks
    ]
    return ground.plot(series, unit, "Time of an update", "zero", "Without the time that previews take.")


def _curve(name: str, points: Sequence[tuple[float, float]], phases: Sequence[Phase]) -> Series:
    """At most ``POINTS`` means, none of which is of two phases."""
    if len(points) <= POINTS:
        return Series(name, points, marks=len(points) < 3)
    bucket = -(-len(points) // POINTS)
    starts = [phase.start for phase in phases]
    means, band = [], []
    for _, part in groupby(points, lambda point: sum(point[0] >= start for start in starts)):
        stretch = list(part)
        for i in range(0, len(stretch), bucket):
            group = stretch[i : i + bucket]
            values = [y for _, y in group]
            means.append((fmean(x for x, _ in group), fmean(values)))
            band.append((min(values), max(values)))
    return Series(name, means, band=band, marks=False)


def _points(rows: Rows, key: str, name: str) -> list[tuple[float, float]]:
    """(update, value) of one network's rows that have the number."""
    return [
        (float(row["update"]), float(row[key]))
        for row in rows
        if str(row.get("network")) == name and _number(row.get(key))
    ]


def _scale(values: Sequence[float]) -> Scale:
    """Logarithmic for losses over more than a factor of 30."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
    if ordered[0] > 0 and high > 30 * low:
        return "log"
    return "zero" if ordered[0] >= 0 else "linear"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
