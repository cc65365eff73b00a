"""Suite -> samples -> features -> scores -> report, for any diffusers pipeline, teacher or student.

The pipeline draws the images itself, through its own call: what is scored is what a user gets. Image i of a suite has a
prompt and a seed of its own (a torch.Generator on the CPU), so a score does not depend on batch size or device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import teacher_cache
from stepdistill.drawing import Drawing, load_pipeline
from stepdistill.errors import UserError
from stepdistill.features import FeatureNetwork
from stepdistill.log import bar
from stepdistill.metrics.clip_score import MeanState, cosines
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.kid import kernel_distance
from stepdistill.provenance import provenance
from stepdistill.suite import Reference, Suite, load_reference, load_suite
from stepdistill.teacher_cache import weights_hash

__all__ = [
    "Report",
    "Scores",
    "StepScores",
    "TeacherScores",
    "evaluate",
    "gap_closed",
    "load_pipeline",
    "score_images",
    "teacher_scores",
    "weights_hash",
]


@dataclass(frozen=True)
class Scores:
    """What the images of one suite scored.

    Attributes:
        n: number of images.
        fd: Frechet distance to the suite's reference (FD-emoji: times 100); lower is better.
        kid, kid_se: unbiased kernel distance and its standard error; None where the suite leaves it out.
        clip_score: mean cosine of image and prompt; None where the suite leaves it out.
    """

    n: int
    fd: float
    kid: float | None
    kid_se: float | None
    clip_score: float | None


@dataclass(frozen=True)
class StepScores(Scores):
    """Scores of a pipeline at one step count.

    Attributes:
        seconds_per_image: wall time of drawing alone (text encoder, network, VAE), without the features.
        network_evaluations: passes of the denoiser per image; a guided step counts two.
    """

    seconds_per_image: float
    network_evaluations: float


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
            f"| pipeline | suite | steps | guidance | {fd} | KID | {clip} | passes | ms an image |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for steps, s in sorted(self.scores.items()):
            kid = "" if s.kid is None or s.kid_se is None else f"{s.kid:.4f} ± {s.kid_se:.4f}"
            score = "" if s.clip_score is None else f"{s.clip_score:.3f}"
            guidance = "" if self.guidance is None else f"{self.guidance:g}"
            lines.append(
                f"| {self.pipeline} | {self.suite} | {steps} | {guidance} | {s.fd:.2f} | {kid} | {score} "
                f"| {s.network_evaluations:g} | {1000 * s.seconds_per_image:.1f} |"
            )
        return "\n".join(lines if header else lines[2:])


def evaluate(
    pipeline: Any,
    suite: str | Path | Suite = "emoji",
    *,
    steps: int | Sequence[int] = 1,
    guidance: float | None = None,
    batch: int = 100,
    device: torch.device | str | None = None,
    progress: bool = True,
    trailing: bool = False,
    eta: float | None = None,
) -> Report:
    """Draw a suite's images with a pipeline and score them.

    Args:
        pipeline: a diffusers pipeline object (its own progress bars are off afterwards), a diffusers folder, a run
            folder (its student), or the name of an embedded teacher.
        suite: the protocol: a name in eval/suites, a YAML file, or a Suite.
        steps: step count, or several; each draws all images.
        guidance: guidance_scale; None is no guidance. Ignored by pipelines whose call does not take it.
        batch: images drawn at a time. Scores do not depend on it.
        device: where to draw; None leaves an object where it is, and puts a folder on CUDA if there is one.
        progress: show a bar.
        trailing: let n steps start at the noisiest timestep, as comparisons at few steps need: discrete schedulers get
            timestep_spacing "trailing" (PNDM, which warms up with extra passes, becomes DDIM), flow schedulers the
            times 1, (n-1)/n, ..., 1/n before their shift. For teachers; a student's grid is its own.
        eta: passed to the call where given: the gamma of a TCD student.

    Raises:
        UserError: no such pipeline or suite, the pipeline and the suite do not fit, or an image is not finite (the
            message names the prompt).
    """
    suite = load_suite(suite)
    counts = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    if not counts or min(counts) < 1:
        raise UserError(f"steps is {steps}; every step count must be at least 1")
    prompts = suite.prompt_list()
    pipe, label = load_pipeline(pipeline, device)
    drawing = Drawing(pipe, suite, prompts, guidance, trailing, eta)
    network = suite.network(pipe.device)
    reference = load_reference(suite, network)
    scores = {}
    for count in counts:
        batches = drawing.batches(count, batch)
        shown = bar(suite.n, f"{suite.label}, {count} step{'s' * (count > 1)}", unit="image", shown=progress)
        base = _score(_advance(batches, shown), prompts, suite, network, reference)
        shown.close()
        seconds, passes = drawing.seconds / suite.n, drawing.passes / suite.n
        scores[count] = StepScores(**asdict(base), seconds_per_image=seconds, network_evaluations=passes)
    return Report(
        suite=suite.label,
        pipeline=label,
        n=suite.n,
        guidance=drawing.guidance,
        trailing=trailing,
        scores=scores,
        metrics={"fd": network.fd_name, "clip_score": network.clip_name if suite.clip_score else None},
        protocol={
            "resize": network.resize,
            "features": network.name,
            "features_sha256": network.sha256,
            "reference_sha256": reference.sha256,
            "suite_sha256": suite.sha256(),
            "seeds": f"image i: torch.Generator('cpu').manual_seed({suite.first_seed} + i)",
        },
        **provenance(pipe.device),
    )


def score_images(
    images: Iterable[Tensor],
    prompts: Sequence[str] | None,
    suite: str | Path | Suite,
    *,
    device: torch.device | str = "cpu",
) -> Scores:
    """Score images that are already there, in the suite's features and against its reference.

    Args:
        images: batches uint8 [B, 3, H, W], of any number in all (a different n than the suite's is another protocol).
        prompts: one per image, in order; None for a suite without CLIP score.
        suite: the protocol.
        device: where the features are computed.
    """
    suite = load_suite(suite)
    network = suite.network(device)
    return _score(images, prompts, suite, network, load_reference(suite, network))


def _score(
    images: Iterable[Tensor],
    prompts: Sequence[str] | None,
    suite: Suite,
    network: FeatureNetwork,
    reference: Reference,
) -> Scores:
    moments, similarity = Moments.empty(network.dimension), MeanState()
    kept: list[Tensor] = []
    for pixels in images:
        features = network.images(pixels)  # [B, D]
        if suite.clip_score:
            texts = (prompts or [])[moments.count : moments.count + len(features)]
            if len(texts) != len(features):
                raise UserError(
                    f"{len(prompts or [])} prompts for more images; the CLIP score needs one prompt an image"
                )
            similarity.add(cosines(features, network.texts(texts)))
        moments.add(features)
        # Kept for the kernel distance, and while fewer than D features make the covariance singular.
        if suite.kid or moments.count <= network.dimension:
            kept.append(features)
    if moments.count < 3:
        raise UserError(f"a distance needs at least 3 images, there are {moments.count}")
    if moments.count <= network.dimension:
        distance = frechet_distance_of_features(torch.cat(kept), reference.moments)
    else:
        distance = frechet_distance(moments, reference.moments)
    kid = None
    if suite.kid and reference.features is not None:
        kid = kernel_distance(torch.cat(kept), reference.features, gamma=network.kernel_scale)
    return Scores(
        n=moments.count,
        fd=network.fd_scale * distance,
        kid=None if kid is None else kid.value,
        kid_se=None if kid is None else kid.standard_error,
        clip_score=similarity.mean if suite.clip_score else None,
    )


@dataclass(frozen=True)
class TeacherScores(StepScores):
    """A teacher's scores at one step count and one guidance.

    Attributes:
        cached: ``shipped`` (eval/reference/teachers.json), ``user`` (the user's cache folder) or None: just computed.
    """

    cached: str | None


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
    and guidance: a score that is found is the score of this very teacher. Times come from the machine that computed it.

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
    for count, key in keys.items():
        entry = None if refresh else teacher_cache.find(key)
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


def _advance(batches: Iterator[Tensor], shown: Any) -> Iterator[Tensor]:
    for pixels in batches:
        yield pixels
        shown.update(len(pixels))
