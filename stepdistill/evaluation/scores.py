"""What an evaluation found: scores of a set of images, of a pipeline by step count, and the report around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.pages.metric_names import marked
from stepdistill.pages.numbers import with_error

AGAINST = "the teacher's pictures"
"""What scores of a student beside its teacher's own pictures are measured against, as report.json says it."""
REPORTED = (
    "fd fd_se kid kid_se clip_score clip_score_se precision recall density coverage diversity second_fd second_fd_se "
    "second_fit second_fit_se seconds_per_image"
).split()
"""Scores of teacher and student in a run's report.json."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the images of one suite scored. A metric that the suite does not ask, or that cannot be computed, is None.

    ``_se`` is the standard error of a score: how far other seeds would move it. It knows nothing of a metric's bias.

    Attributes:
        n: number of images.
        fd, fd_se: Frechet distance to the suite's reference (FD-emoji: times 100); lower is better.
        kid, kid_se: unbiased kernel distance.
        clip_score, clip_score_se: mean cosine of image and prompt.
        precision, recall: shares of drawn images among the real ones, and of real images among the drawn ones, by k
            nearest neighbours.
        density, coverage: their counterparts that outliers do not flatter.
        precision_se, recall_se, density_se, coverage_se: theirs.
        fid_infinity, fid_infinity_se: the Frechet distance at n without end.
        sfid, sfid_se: Frechet distance in features that keep their place.
        inception_score, inception_score_deviation: the mean over 10 splits and the standard deviation between them, as
            the literature states it.
        cmmd, cmmd_se: 1,000 times the kernel distance of CLIP embeddings.
        pick_score, pick_score_se: mean PickScore.
        aesthetic, aesthetic_se: mean aesthetic score.
        second_fd, second_fd_se: Frechet distance in the suite's second features; lower is better.
        second_fit, second_fit_se: mean fit of image and prompt in their network: of the judge in nats.
        own: your own metrics: ``NAME`` and, where it is known, ``NAME_se``.
        own_missing: those that have no value, and why.
    """

    n: int
    fd: float | None = None
    fd_se: float | None = None
    kid: float | None = None
    kid_se: float | None = None
    clip_score: float | None = None
    clip_score_se: float | None = None
    precision: float | None = None
    precision_se: float | None = None
    recall: float | None = None
    recall_se: float | None = None
    density: float | None = None
    density_se: float | None = None
    coverage: float | None = None
    coverage_se: float | None = None
    fid_infinity: float | None = None
    fid_infinity_se: float | None = None
    sfid: float | None = None
    sfid_se: float | None = None
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    cmmd: float | None = None
    cmmd_se: float | None = None
    pick_score: float | None = None
    pick_score_se: float | None = None
    aesthetic: float | None = None
    aesthetic_se: float | None = None
    second_fd: float | None = None
    second_fd_se: float | None = None
    second_fit: float | None = None
    second_fit_se: float | None = None
    own: Mapping[str, float | None] = field(default_factory=dict)
    own_missing: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Every field by name, your own metrics beside the others."""
        found = asdict(self)
        own = found.pop("own")
        del found["own_missing"]
        return {**found, **own}


@dataclass(frozen=True, kw_only=True)
class StepScores(Scores):
    """Scores of a pipeline at one step count.

    Attributes:
        seconds_per_image: wall time of drawing alone (text encoder, network, VAE) in one process, without the features,
            taken while the process did nothing else.
        network_evaluations: passes of the denoiser per image; a guided step counts two.
        diversity, diversity_se: mean 1 - cosine of the features of samples of one prompt, and its standard error over
            prompts; None where the suite leaves it out.
        images_per_second: drawn by all processes together; None for images that were there already.
        peak_memory_bytes: most memory that a process had held when its images were drawn, the feature networks
            included: allocated on a GPU, resident on a CPU.
    """

    seconds_per_image: float
    network_evaluations: float
    diversity: float | None = None
    diversity_se: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """Scores with all that is needed to get them again; ``save`` writes it as JSON.

    Attributes:
        suite: ``name@version``.
        pipeline: what was scored: a folder or a class name.
        n: images per step count.
        guidance: guidance_scale of the calls, None where the pipeline takes none.
        trailing: whether the scheduler was re-configured (see :func:`evaluate`).
        scores: by step count.
        metrics: what the scores are called, ``fd``, ``clip_score`` and those that the suite asks besides.
        better: of your own metrics: ``lower``, ``higher`` or ``neither``.
        protocol: resize, SHA-256 of networks, references and suite, the rules of the seeds and of standard errors.
        versions, command, hardware, commit: where the numbers come from; commit is None outside a checkout.
        conflicts: the scores in the eyes of a network that the pipeline's training looked through, and what says so.
        images: of images that were there already: what was used, converted and skipped, and the pixels' SHA-256. Their
            only step count is 0.
        warnings: of metrics for which there are too few images, and why; of filters that were off and prompts cut off.
        not_computed: metrics that the suite asks and that are None, and why: their weights are missing, or there are
            too few images for any value.
    """

    suite: str
    pipeline: str
    n: int
    guidance: float | None
    trailing: bool
    scores: Mapping[int, StepScores]
    metrics: Mapping[str, str | None]
    protocol: Mapping[str, str]
    versions: Mapping[str, str]
    command: str
    hardware: str
    commit: str | None
    better: Mapping[str, str] = field(default_factory=dict)
    conflicts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()
    not_computed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: step counts become strings."""
        return {**asdict(self), "scores": {str(k): v.values() for k, v in self.scores.items()}}

    def save(self, file: str | Path) -> None:
        """Write the report as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")

    def markdown(self, *, header: bool = True) -> str:
        """A table with one row for each step count, and with columns for the metrics that not every suite has."""
        scores = sorted(self.scores.items())
        names = {"fd": "FD", "clip_score": "CLIP", "kid": "KID"}
        names |= {key: name for key, name in self.metrics.items() if name is not None}
        kept: list[tuple[str, str | None, str]] = [
            (key, error, form)
            for key, error, form in _COLUMNS
            if key not in _SOME or any(found.values()[key] is not None for _, found in scores)
        ]
        kept += [(key, f"{key}_se", "{:.4g}") for key in self.better]
        titles = [names.get(key, key.replace("_", " ")) + marked(key, self.conflicts) for key, *_ in kept]
        heads = ["pipeline", "suite", "steps", "guidance", *titles, "passes", "ms an image"]
        lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        for steps, found in scores:
            values = found.values()
            cells = [self.pipeline, self.suite, str(steps or "")]
            cells.append("" if self.guidance is None else f"{self.guidance:g}")
            for key, error, form in kept:
                value = values.get(key)
                cells.append(
                    "" if value is None else with_error(value, values.get(error) if error else None, form)
                )
            drawn = (f"{found.network_evaluations:g}", f"{1000 * found.seconds_per_image:.1f}")
            cells += drawn if steps else ("", "")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines if header else lines[2:])


_COLUMNS = (
    ("fd", "fd_se", "{:.2f}"),
    ("second_fd", "second_fd_se", "{:.2f}"),
    ("fid_infinity", "fid_infinity_se", "{:.2f}"),
    ("sfid", "sfid_se", "{:.2f}"),
    ("kid", "kid_se", "{:.4f}"),
    ("cmmd", "cmmd_se", "{:.3f}"),
    ("inception_score", "inception_score_deviation", "{:.2f}"),
    ("clip_score", "clip_score_se", "{:.3f}"),
    ("second_fit", "second_fit_se", "{:.3f}"),
    ("pick_score", "pick_score_se", "{:.2f}"),
    ("aesthetic", "aesthetic_se", "{:.2f}"),
    ("precision", None, "{:.3f}"),
    ("recall", None, "{:.3f}"),
    ("density", None, "{:.3f}"),
    ("coverage", None, "{:.3f}"),
    ("diversity", "diversity_se", "{:.4f}"),
)
"""Columns of the table: score, what stands behind its ±, how it is written without."""
_SOME = frozenset(
    {"second_fd", "second_fit", "fid_infinity", "sfid", "cmmd", "inception_score", "pick_score", "aesthetic"}
)
"""Those that are left out where no row has them."""


def by_metric(scores: Mapping[int, StepScores]) -> dict[str, dict[str, float | None]]:
    """Each score of REPORTED, and of your own metrics, by step count, as a run's report.json has them."""
    every = {str(steps): found.values() for steps, found in scores.items()}
    names = dict.fromkeys([*REPORTED, *(name for found in scores.values() for name in found.own)])
    return {name: {steps: found.get(name) for steps, found in every.items()} for name in names}
