"""Suite -> samples -> features -> scores -> report, for any diffusers pipeline, teacher or student.

The pipeline draws the images itself, through its own call: what is scored is what a user gets. Image i of a suite has a
prompt and a seed of its own (a torch.Generator on the CPU), so a score does not depend on batch size or device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import teacher_cache
from stepdistill.drawing import load_pipeline
from stepdistill.errors import UserError
from stepdistill.evaluation_folder import workplace, write_results
from stepdistill.extraction import Extraction
from stepdistill.measure import measure
from stepdistill.processes import ALONE, Processes
from stepdistill.provenance import provenance
from stepdistill.scores import Report, Scores, StepScores
from stepdistill.shards import ShardWriter
from stepdistill.statement import statement, tell
from stepdistill.suite import Suite, load_reference, load_suite
from stepdistill.teacher_cache import weights_hash
from stepdistill.work import Work

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
    output: str | Path | None = None,
    processes: Processes | None = None,
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
        output: folder for report.json, report.md, report.html and what they are made of. An evaluation that was stopped
            goes on from the images that it had drawn when it is called again.
        processes: those that draw together, each its part; all of them must call this, and all get the report. Give
            ``stepdistill.processes.launched()``. None is this process alone, whatever others there are.

    Raises:
        UserError: no such pipeline or suite, the pipeline and the suite do not fit, an image is not finite (the message
            names the prompt), or ``output`` holds another evaluation or a damaged file.
        OtherProcessError: another process ended with an error.
    """
    suite = load_suite(suite)
    counts = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    if not counts or min(counts) < 1:
        raise UserError(f"steps is {steps}; every step count must be at least 1")
    if not (suite.n and suite.resolution):
        raise UserError(
            f"suite {suite.label} leaves n or resolution open: it measures images; a pipeline needs both"
        )
    processes = processes or ALONE
    processes.together(suite.reference_file)  # its absence is told before anything is loaded
    folder = None if output is None else Path(output)
    device = processes.device if device is None else device
    work = processes.together(lambda: Work(pipeline, suite, device, guidance, trailing, eta))
    main, extraction, drawing = processes.main, work.extraction, work.drawing
    if folder is not None:  # before features of a reference's images are computed
        processes.together(lambda: work.refuse_another(folder) if main else None)
    reference = processes.together(
        lambda: load_reference(suite, extraction.network, progress=progress) if main else None
    )
    with workplace(folder, processes) as place:
        parts = processes.together(lambda: work.parts(place, counts, processes, keyed=folder is not None))
        with processes.sharing(place):
            for part in parts:
                shown = progress and main
                work.draw(part, batch, processes, place, shown=shown, pictures=folder is not None)
                if reference is not None:
                    part.save(work.scores(part, reference, pictures=folder is not None))
            scores = {part.steps: part.wait(processes, place) for part in parts}
    drawn = {
        "seeds": f"image i: torch.Generator('cpu').manual_seed({suite.first_seed} + i)",
        "diversity": f"{suite.diversity} samples of {suite.diversity_prompts} prompts"
        if suite.diversity
        else "none",
    }
    report = Report(
        suite=suite.label,
        pipeline=work.label,
        n=suite.n,
        guidance=drawing.guidance,
        trailing=trailing,
        scores=scores,
        **statement(extraction, scores[counts[0]], drawn, work.remarks),
        **provenance(work.pipe.device),
    )
    if main:
        tell(report)
        if folder is not None:
            write_results(report, folder, suite)
    return report


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
    extraction = Extraction(suite, device)
    reference = load_reference(suite, extraction.network)
    with tempfile.TemporaryDirectory(prefix="stepdistill-") as folder:
        rows = ShardWriter(Path(folder))
        for pixels in images:
            texts = None if prompts is None else prompts[rows.count : rows.count + len(pixels)]
            rows.add(extraction(pixels, texts))
        return measure(rows.table(), suite, extraction.network, reference)


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
