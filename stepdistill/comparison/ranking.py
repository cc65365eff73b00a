"""Finished runs and evaluations side by side, in groups whose numbers mean the same, each ranked in itself. Reads
reports; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

from stepdistill.comparison.differences import differences
from stepdistill.errors import UserError
from stepdistill.evaluation.scores import AGAINST
from stepdistill.training.run_report import Measured

SURE = 2.0
"""Standard errors of a difference from which it is sure: wrong in 5 % of pairs that are equal."""


@dataclass(frozen=True)
class Row:
    """One run at one number of steps; what was not measured is None.

    Attributes:
        name: the run's name, or its folder's.
        method: its method.
        steps: network evaluations per image; 0 of images that were there already.
        gap_closed: share of the way from the one-step teacher to the full teacher, 1 is the teacher.
        fd, fd_se: Frechet distance of the student, lower is better, and its standard error.
        kid, kid_se: kernel distance, lower is better, and its standard error.
        clip_score, clip_score_se: CLIP score of the student, higher is better, and its standard error.
        second_fd, second_fd_se, second_fit, second_fit_se: in the suite's second features, of ``emoji`` the judge's:
            Frechet distance, and how well pictures fit their prompts, with their standard errors.
        recall, density: see stepdistill.metrics; higher is better.
        recall_of_teachers: recall over that of the teacher at full steps.
        ms_per_image: milliseconds of drawing an image, in the batches and on the machine of the evaluation.
        train_seconds, peak_memory_bytes: what the training took.
        updates, updates_planned: updates done, and in the recipe; fewer where a budget ended the training.
        passes: network passes of the training, of teacher, student and followers together, its pairs included.
        suite: name and version.
        against: what it was measured against; None where the report does not say.
        second_names: what its suite calls ``second_fd`` and ``second_fit``.
        conflicts: scores in the eyes of a network that the run's loss looked through, and the keys that say so.
        own: your own metrics: value and standard error by name.
        seeds: how many trainings of other seeds the row is the mean of; None of one run by itself.
        deviation: standard deviation between those trainings, by score; empty of one.
    """

    name: str
    method: str
    steps: int
    gap_closed: float | None
    fd: float | None
    fd_se: float | None
    kid: float | None
    kid_se: float | None
    clip_score: float | None
    clip_score_se: float | None
    second_fd: float | None
    second_fd_se: float | None
    second_fit: float | None
    second_fit_se: float | None
    recall: float | None
    density: float | None
    recall_of_teachers: float | None
    ms_per_image: float | None
    train_seconds: float | None
    peak_memory_bytes: int | None
    updates: int | None
    updates_planned: int | None
    passes: int | None
    suite: str | None = None
    against: str | None = None
    second_names: tuple[str, str] = ("FD 2", "fit 2")
    conflicts: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    seeds: int | None = None
    deviation: Mapping[str, float] = field(default_factory=dict)

    def error_of(self, score: str) -> float | None:
        """Standard error of a score that has one: the evaluation's, and of several trainings that of their mean. The
        evaluation's counts whole, as all trainings are measured with the same seeds."""
        own: float | None = getattr(self, f"{score}_se")
        if own is None or score not in self.deviation:
            return own
        return math.hypot(own, self.deviation[score] / math.sqrt(self.seeds or 1))

    def with_own(self, names: Iterable[str]) -> Row:
        """The row with its own metrics in the order of ``names``, also those that it has not."""
        return replace(self, own={name: self.own.get(name, (None, None)) for name in names})


@dataclass(frozen=True)
class Group:
    """Reports whose numbers mean the same.

    Attributes:
        title: the suite and the number of images; of runs without scores, that they have none.
        reports: whose they are.
        rows: ranked.
        apart: why they are not compared with the first group; empty for the first.
        notes: by what they are ranked, and who is not, where a run's own loss looked through a network that scores it.
    """

    title: str
    reports: Sequence[Measured]
    rows: Sequence[Row]
    apart: Sequence[str] = ()
    notes: Sequence[str] = ()


def groups(reports: Sequence[Measured], repeats: Mapping[str, str] | None = None) -> list[Group]:
    """The reports, those together that compare, in the order of the first of each group; those without scores last.

    Args:
        reports: of runs and evaluations.
        repeats: run -> what it is a training of, for runs that differ in their seed alone: their rows become one.
    """
    together: list[list[Measured]] = []
    for report in reports:
        if has_scores(report):
            fitting = (group for group in together if not differences([*group, report]))
            group = next(fitting, None)
            together.append([report]) if group is None else group.append(report)
    found = []
    for place, group in enumerate(together):
        one = group[0]
        apart = differences([together[0][0], one]) if place else []
        plain = [why for why in apart if not why.startswith("protocol.suite_sha256")]
        rows = rank(group, repeats)
        against = f", against {one.against}" if one.against else ""
        suites = ", ".join(dict.fromkeys(str(report.suite) for report in group))
        title = f"suite {suites}, {one.n:,} images{against}"
        found.append(Group(title, group, rows, plain or apart, ranking_notes(rows, one.metrics)))
    if without := [report for report in reports if not has_scores(report)]:
        rows = [_row(report, "0") for report in without]
        why = ["they have no scores: set evaluate in the recipe, or use stepdistill eval"]
        found.append(Group("not measured", without, rows, why if found else []))
    return found


def has_scores(report: Measured) -> bool:
    """Whether anything was measured."""
    return any(report.student.values())


def rank(reports: Sequence[Measured], repeats: Mapping[str, str] | None = None) -> list[Row]:
    """One row per run and number of steps: by steps, then by distance, best first; see :func:`ranked_by`.

    Args:
        reports: that compare.
        repeats: see :func:`groups`.

    Raises:
        UserError: the reports were measured differently; every field that differs is named, with its values.
    """
    if found := differences(reports):
        raise UserError(f"these reports cannot be ranked: {'; '.join(found)}; evaluate them with one suite")
    rows = [row for report in reports for row in _rows(report)]
    if repeats:
        together: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            together.setdefault((repeats.get(row.name, row.name), row.steps), []).append(row)
        rows = [_mean(name, some) for (name, _), some in together.items()]
    by = ranked_by(rows)

    def place(row: Row) -> tuple[int, bool, bool, float]:
        value: float | None = getattr(row, by)
        return row.steps, by in row.conflicts, value is None, value or 0.0

    return sorted(rows, key=place)


def ranked_by(rows: Sequence[Row]) -> Literal["fd", "kid", "second_fd"]:
    """The distance that ranks: the Frechet distance of the suite's features, and against the teacher's pictures the
    kernel distance; where the loss of a run looked through their network, the Frechet distance of the second features,
    if every run has it and none looked through theirs. Otherwise the run has no rank and stands behind the others."""
    first = _first_choice(rows)
    if not any(first in row.conflicts for row in rows):
        return first
    free = all(row.second_fd is not None and "second_fd" not in row.conflicts for row in rows)
    return "second_fd" if free else first


def _first_choice(rows: Sequence[Row]) -> Literal["fd", "kid"]:
    """Against the teacher's pictures KID: the Frechet distance of few pictures is far from 0 for a student of the
    teacher's distribution that draws other pictures, and not for one that draws the same."""
    return "kid" if rows and all(row.against == AGAINST for row in rows) else "fd"


def ranks(row: Row, rows: Sequence[Row]) -> tuple[int, int] | None:
    """The best and the worst place that a row may have among the rows of its number of steps, from 1. A place is sure
    against those whose distance (see :func:`ranked_by`) differs by more than SURE standard errors of the difference,
    the root of the two errors' squares; it is sure against none where an error is not known. None where the row has no
    rank, or is alone."""
    by = ranked_by(rows)
    others = [
        other
        for other in rows
        if other.steps == row.steps and getattr(other, by) is not None and by not in other.conflicts
    ]
    if len(others) < 2 or not any(other is row for other in others):
        return None

    def sure(better: Row, worse: Row) -> bool:
        errors = better.error_of(by), worse.error_of(by)
        if errors[0] is None or errors[1] is None:
            return False
        return bool(getattr(worse, by) - getattr(better, by) > SURE * math.hypot(errors[0], errors[1]))

    return 1 + sum(sure(other, row) for other in others), len(others) - sum(
        sure(row, other) for other in others
    )


def ranking_notes(rows: Sequence[Row], metrics: Mapping[str, Any]) -> list[str]:
    """What is to be said of a ranking against the teacher's pictures, or where losses have looked through networks that
    score; sentences."""
    choice, by = _first_choice(rows), ranked_by(rows)
    first, second = metrics.get("fd") or "FD", metrics.get("second_fd") or "the second features' FD"
    found = []
    if by == "kid":
        found.append(
            "Ranked by KID, as an FD of few pictures is lower where a student draws the very pictures of its teacher."
        )
    seen = {row.name: row.conflicts[choice] for row in rows if choice in row.conflicts}
    said = ", ".join(f"{name} ({key})" for name, key in seen.items())
    if seen and by == "second_fd":
        found.append(f"Ranked by {second}, as the loss of {said} looked through the network of {first}.")
    elif seen:
        found.append(
            f"Not ranked, and behind the others: {said}, whose loss looked through the network of {first}; not every "
            f"run here has {second}, or a loss looked through its network, too."
        )
    if any(row.conflicts for row in rows):
        found.append("* The run's own loss looked through the network of this score, which flatters it.")
    return found


_SCORES = (
    *("gap_closed", "fd", "kid", "clip_score", "second_fd", "second_fit"),
    *("recall", "density", "recall_of_teachers"),
)
_ERRORS = ("fd_se", "kid_se", "clip_score_se", "second_fd_se", "second_fit_se")


def _mean(name: str, rows: Sequence[Row]) -> Row:
    """The mean of trainings of other seeds, their deviation, and the error of an evaluation (root mean square)."""

    def known(key: str) -> list[float]:
        return [value for row in rows if (value := getattr(row, key)) is not None]

    def error(values: Sequence[float]) -> float | None:
        return math.sqrt(fmean(value**2 for value in values)) if values else None

    scores = {key: known(key) for key in _SCORES}
    errors: dict[str, Any] = {key: error(known(key)) for key in _ERRORS}
    names = dict.fromkeys(own for row in rows for own in row.own)
    own = {
        key: [value for row in rows if (value := row.own.get(key, (None, None))[0]) is not None]
        for key in names
    }
    own_errors = {
        key: [e for row in rows if (e := row.own.get(key, (None, None))[1]) is not None] for key in names
    }
    means: dict[str, Any] = {key: fmean(values) if values else None for key, values in scores.items()}
    means |= {key: fmean(found) for key in ("ms_per_image", "train_seconds") if (found := known(key))}
    means |= {key: round(fmean(found)) for key in ("updates", "passes") if (found := known(key))}
    return replace(
        rows[0],
        name=name,
        **means,
        **errors,
        own={key: (fmean(values) if values else None, error(own_errors[key])) for key, values in own.items()},
        seeds=len(rows),
        deviation={key: stdev(values) for key, values in {**scores, **own}.items() if len(values) > 1},
    )


def _rows(report: Measured) -> list[Row]:
    steps_seen = dict.fromkeys(steps for scores in report.student.values() for steps in scores)
    return [_row(report, steps) for steps in steps_seen]


def _row(report: Measured, steps: str) -> Row:
    def of(metric: str) -> Any:
        return (report.student.get(metric) or {}).get(steps)

    return Row(
        name=report.name,
        method=report.method,
        steps=int(steps),
        gap_closed=report.gap_closed.get(steps),
        fd=of("fd"),
        fd_se=of("fd_se"),
        kid=of("kid"),
        kid_se=of("kid_se"),
        clip_score=of("clip_score"),
        clip_score_se=of("clip_score_se"),
        second_fd=of("second_fd"),
        second_fd_se=of("second_fd_se"),
        second_fit=of("second_fit"),
        second_fit_se=of("second_fit_se"),
        recall=of("recall"),
        density=of("density"),
        recall_of_teachers=report.recall_of_teachers.get(steps),
        ms_per_image=1000 * s if (s := of("seconds_per_image")) else None,  # 0: nothing was drawn
        train_seconds=report.train_seconds,
        peak_memory_bytes=report.peak_memory_bytes,
        updates=report.updates,
        updates_planned=report.updates_planned,
        passes=report.all_passes,
        suite=report.suite,
        against=report.against,
        second_names=(
            str(report.metrics.get("second_fd") or "FD 2"),
            str(report.metrics.get("second_fit") or "fit 2"),
        ),
        conflicts=report.conflicts,
        own={name: (of(name), of(f"{name}_se")) for name in report.better},
    )
