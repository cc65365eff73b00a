"""What an evaluation found: scores of a set of images, of a pipeline by step count, and the report around them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORTED = "fd kid kid_se clip_score precision recall density coverage diversity seconds_per_image".split()
"""Scores of teacher and student in a run's report.json."""


@dataclass(frozen=True)
class Scores:
    """What the images of one suite scored.

    Attributes:
        n: number of images.
        fd: Frechet distance to the suite's reference (FD-emoji: times 100); lower is better.
        kid, kid_se: unbiased kernel distance and its standard error; None where the suite leaves it out.
        clip_score: mean cosine of image and prompt; None where the suite leaves it out.
        precision, recall: shares of drawn images among the real ones, and of real images among the drawn ones, by k
            nearest neighbours; None where the suite or the reference leaves them out.
        density, coverage: their counterparts that outliers do not flatter; as these.
    """

    n: int
    fd: float
    kid: float | None
    kid_se: float | None
    clip_score: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None


@dataclass(frozen=True)
class StepScores(Scores):
    """Scores of a pipeline at one step count.

    Attributes:
        seconds_per_image: wall time of drawing alone (text encoder, network, VAE), without the features.
        network_evaluations: passes of the denoiser per image; a guided step counts two.
        diversity, diversity_se: mean 1 - cosine of the features of samples of one prompt, and its standard error over
            prompts; None where the suite leaves it out.
    """

    seconds_per_image: float
    network_evaluations: float
    diversity: float | None = None
    diversity_se: float | None = None


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
        metrics: what ``fd`` and ``clip_score`` are called.
        protocol: resize, SHA-256 of features, reference and suite, the rule of the seeds.
        versions, command, hardware, commit: where the numbers come from; commit is None outside a checkout.
        images: of images that were there already: what was used, converted and skipped, and the pixels' SHA-256. Their
            only step count is 0.
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
    images: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: step counts become strings."""
        return {**asdict(self), "scores": {str(k): asdict(v) for k, v in self.scores.items()}}

    def save(self, file: str | Path) -> None:
        """Write the report as JSON."""
        Path(file).write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")

    def markdown(self, *, header: bool = True) -> str:
        """A table with one row for each step count."""
        fd, clip = self.metrics["fd"], self.metrics["clip_score"] or "CLIP"
        lines = [
            f"| pipeline | suite | steps | guidance | {fd} | KID | {clip} | precision | recall | density | coverage "
            "| diversity | passes | ms an image |",
            f"|{' --- |' * 14}",
        ]
        for steps, s in sorted(self.scores.items()):
            kid = "" if s.kid is None or s.kid_se is None else f"{s.kid:.4f} ± {s.kid_se:.4f}"
            score = "" if s.clip_score is None else f"{s.clip_score:.3f}"
            near = " | ".join(
                "" if x is None else f"{x:.3f}" for x in (s.precision, s.recall, s.density, s.coverage)
            )
            spread = "" if s.diversity is None else f"{s.diversity:.4f} ± {s.diversity_se:.4f}"
            guidance = "" if self.guidance is None else f"{self.guidance:g}"
            drawn = f"{s.network_evaluations:g} | {1000 * s.seconds_per_image:.1f}" if steps else " | "
            lines.append(
                f"| {self.pipeline} | {self.suite} | {steps or ''} | {guidance} | {s.fd:.2f} | {kid} | {score} "
                f"| {near} | {spread} | {drawn} |"
            )
        return "\n".join(lines if header else lines[2:])


def by_metric(scores: Mapping[int, StepScores]) -> dict[str, dict[str, float | None]]:
    """Each score of REPORTED by step count, as a run's report.json has them."""
    every = {str(steps): asdict(found) for steps, found in scores.items()}
    return {name: {steps: found[name] for steps, found in every.items()} for name in REPORTED}
