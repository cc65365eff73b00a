"""Suite -> samples -> features -> scores -> report, for any diffusers pipeline, teacher or student.

The pipeline draws the images itself, through its own call: what is scored is what a user gets. Image i of a suite has a
prompt and a seed of its own (a torch.Generator on the CPU), so a score does not depend on batch size or device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import UserError
from stepdistill.evaluation.conflicts import conflicts, loss_saw
from stepdistill.evaluation.folder import workplace, write_results
from stepdistill.evaluation.parts import Work
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.scores import Report
from stepdistill.evaluation.statement import statement, tell
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.own_call import own_call
from stepdistill.system.processes import ALONE, Processes
from stepdistill.system.provenance import provenance


def evaluate(
    pipeline: Any,
    suite: str | Path | Suite = "emoji",
    *,
    steps: int | Sequence[int] | None = None,
    guidance: float | None = None,
    batch: int = 100,
    device: torch.device | str | None = None,
    progress: bool = True,
    trailing: bool = False,
    eta: float | None = None,
    output: str | Path | None = None,
    processes: Processes | None = None,
    saw: Mapping[str, str] | None = None,
) -> Report:
    """Draw a suite's images with a pipeline and score them.

    Args:
        pipeline: a diffusers pipeline object (its own progress bars are off afterwards), a diffusers folder, a run
            folder (its student), or the name of an embedded teacher.
        suite: the protocol: a name in eval/suites, a YAML file, or a Suite.
        steps: step count, or several; each draws all images. None is a student's own, and the
            suite's ``teacher_steps`` of any other pipeline.
        guidance: guidance_scale; None is that of a student's own call, and none of any other pipeline. Ignored by
            pipelines whose call does not take it.
        batch: images drawn at a time. Scores do not depend on it.
        device: where to draw; None leaves an object where it is, and puts a folder on CUDA if there is one.
        progress: show a bar.
        trailing: let n steps start at the noisiest timestep, as comparisons at few steps need: discrete schedulers get
            timestep_spacing "trailing" (PNDM, which warms up with extra passes, becomes DDIM), flow schedulers the
            times 1, (n-1)/n, ..., 1/n before their shift. For teachers; a student's grid is its own.
        eta: passed to the call where given: the gamma of a TCD student; None is that of a student's own call.
        output: folder for report.json, report.md, report.html and what they are made of. An evaluation that was stopped
            goes on from the images that it had drawn when it is called again.
        processes: those that draw together, each its part; all of them must call this, and all get the report. Give
            ``stepdistill.system.processes.launched()``. None is this process alone, whatever others there are.
        saw: feature networks that the pipeline's training looked through, and what says so; None is what the report of
            a run says. Scores in their eyes are marked.

    Raises:
        UserError: no such pipeline or suite, the pipeline and the suite do not fit, a student was not trained for a
            step count, an image is not finite (the message names the prompt), or ``output`` holds another evaluation or
            a damaged file.
        OtherProcessError: another process ended with an error.
    """
    suite = load_suite(suite)
    own = None
    if isinstance(pipeline, (str, Path)) and not trailing:
        own = own_call(find_pipeline(pipeline))
    if steps is None:
        steps = suite.teacher_steps if own is None else own.steps
    counts = [steps] if isinstance(steps, int) else list(dict.fromkeys(steps))
    if not counts or min(counts) < 1:
        raise UserError(f"steps is {steps}; every step count must be at least 1")
    if own is not None:
        for count in counts:
            own.check_steps(count)
        guidance = own.input_guidance if guidance is None else guidance
        eta = own.arguments.get("eta") if eta is None else eta
    if not (suite.n and suite.resolution):
        raise UserError(
            f"suite {suite.label} leaves n or resolution open: it measures images; a pipeline needs both"
        )
    processes = processes or ALONE
    processes.together(suite.reference_file)  # its absence is told before anything is loaded
    folder = None if output is None else Path(output)
    device = processes.device if device is None else device
    told = own.arguments if own else {}
    work = processes.together(lambda: Work(pipeline, suite, device, guidance, trailing, eta, told))
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
    marked = conflicts(suite.asked(suite.features), loss_saw(pipeline) if saw is None else saw)
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
        conflicts=marked,
        **statement(extraction, scores[counts[0]], drawn, work.remarks),
        **provenance(work.pipe.device),
    )
    if main:
        tell(report)
        if folder is not None:
            write_results(report, folder, suite)
    return report
