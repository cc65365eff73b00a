"""A teacher's scores by step count, computed once, and the gap that a student closes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import UserError
from stepdistill.evaluation import teacher_scores as teacher_cache
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.scores import StepScores
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import second_of, suite_sha256
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json
from stepdistill.system.shipped import cache_folder, content_folder

SHIPPED = "teachers.json"
NEWEST = "coverage"
"""The metric that suites compute and that was added last."""


@dataclass(frozen=True)
class Entry:
    """A cached score.

    Attributes:
        scores: the fields of StepScores.
        source: ``shipped`` or ``user``.
    """

    scores: dict[str, Any]
    source: str


def key(weights: str, suite: Suite, steps: int, guidance: float) -> str:
    """The name of a score: it changes with anything that can move it."""
    content = [weights, suite.label, suite_sha256(suite), steps, float(guidance)]
    if suite.diversity:  # a score of its own, apart from the suite's hash
        content += [suite.diversity, suite.diversity_prompts]
    if suite.intervals:  # an error of its own, apart as well
        content.append("intervals")
    content += sorted(second_of(suite).values())
    content += [f"{metric.name} {metric.sha256}" for metric in suite.own_metrics()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def find(name: str) -> Entry | None:
    """The cached score of a key, or None. A file of the user's cache that cannot be read counts as absent, and so
    does a score from before a metric of the suites' was there."""
    shipped = content_folder("eval") / "reference" / SHIPPED
    if shipped.is_file():
        entries = parse_json(shipped.read_text("utf-8"))
        if name in entries and NEWEST in entries[name]["scores"]:
            return Entry(entries[name]["scores"], "shipped")
    file = cache_folder() / "teachers" / f"{name}.json"
    try:
        scores = parse_json(file.read_text("utf-8"))["scores"]
    except (OSError, ValueError, KeyError):
        return None
    return Entry(scores, "user") if NEWEST in scores else None


def store(name: str, content: dict[str, Any]) -> None:
    """Put a score into the user's cache; a cache that cannot be written is passed over, the score is not lost."""
    file = cache_folder() / "teachers" / f"{name}.json"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1), "utf-8")


@dataclass(frozen=True)
class TeacherScores(StepScores):
    """A teacher's scores at one step count and one guidance.

    Attributes:
        cached: ``shipped`` (eval/reference/teachers.json), ``user`` (the user's cache folder) or None: just computed.
    """

    cached: str | None = None


def teacher_scores(
    teacher: Any,
    suite: str | Path | Suite = "emoji",
    *,
    steps: int | Sequence[int],
    guidance: float,
    batch: int = 100,
    device: torch.device | str | None = None,
    progress: bool = True,
    refresh: bool = False,
) -> dict[int, TeacherScores]:
    """A teacher's scores by step count, on trailing grids, from the cache where it holds them.

    The key is a SHA-256 of weights and configs, suite (protocol, prompts, seeds, features and reference), step count
    and guidance: a score that is found is the score of this very teacher; where the suite adds to another version, also
    one of that version, which lacks what was added. Times come from the machine that computed it.

    Args:
        teacher: folder, embedded name or pipeline object; an object and its folder have different keys, as their
            precision may differ.
        suite: the protocol.
        steps: step count, or several.
        guidance: guidance_scale.
        batch, device, progress: see :func:`evaluate`.
        refresh: compute and store even what is in a cache.

    Raises:
        UserError: as :func:`evaluate`.
    """
    suite = load_suite(suite)
    counts = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    weights = weights_hash(teacher)
    keys = {count: teacher_cache.key(weights, suite, count, guidance) for count in counts}
    found: dict[int, TeacherScores] = {}
    before = suite.before()
    for count, key in keys.items():
        entry = None if refresh else teacher_cache.find(key)
        if entry is None and not refresh and before is not None:
            entry = teacher_cache.find(teacher_cache.key(weights, before, count, guidance))
        if entry is not None:
            found[count] = TeacherScores(**entry.scores, cached=entry.source)
    missing = [count for count in counts if count not in found]
    if missing:
        report = evaluate(
            teacher,
            suite,
            steps=missing,
            guidance=guidance,
            batch=batch,
            device=device,
            progress=progress,
            trailing=True,
        )
        for count, scores in report.scores.items():
            about = {"pipeline": report.pipeline, "suite": suite.label, "steps": count, "guidance": guidance}
            origin = {"versions": dict(report.versions), "hardware": report.hardware}
            teacher_cache.store(keys[count], {**about, "scores": asdict(scores), **origin})
            found[count] = TeacherScores(**asdict(scores), cached=None)
    return {count: found[count] for count in counts}


def gap_closed(fd_student: float, fd_teacher_one: float, fd_teacher_full: float) -> float:
    """The share of the teacher's loss from few steps that the student wins back: 0 is the teacher at one step, 1 the
    teacher at full steps; above 1 the student is better than that.

    Raises:
        UserError: the teacher is no better with full steps than with one, so there is no gap.
    """
    gap = fd_teacher_one - fd_teacher_full
    if gap <= 0:
        raise UserError(
            f"the teacher scores {fd_teacher_one:.3f} at one step and {fd_teacher_full:.3f} at full steps: no gap"
        )
    return (fd_teacher_one - fd_student) / gap
