"""The end of a run: the student exported, proven, measured and drawn, and what is reported of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.scores import by_metric
from stepdistill.evaluation.suite import load_suite
from stepdistill.evaluation.teacher_scores import gap_closed, teacher_scores
from stepdistill.export.adapters import called_with
from stepdistill.export.card import for_folder, model_card
from stepdistill.export.schedulers import stock_scheduler
from stepdistill.export.student_folder import export, pipeline_call
from stepdistill.export.verify import verify
from stepdistill.networks.averages import averaged
from stepdistill.networks.own_call import TEACHER_STEPS
from stepdistill.networks.pictures import draw_as_pipeline, teacher_pictures, to_uint8
from stepdistill.pages.sheets import rows_of_pictures
from stepdistill.system.log import read_stats, say
from stepdistill.system.memory import peak_memory
from stepdistill.system.run_folder import RunFolder, RunStatus
from stepdistill.system.shipped import module_summaries
from stepdistill.training.assemble import Assembled
from stepdistill.training.report import score_table, write_report
from stepdistill.training.run import Finished
from stepdistill.training.run_report import RunReport


def card(run: Assembled, command: str, scores: str = "") -> str:
    """The student's model card."""
    codec = run.teacher.codec
    pipeline = codec.family.student_pipeline(codec.pipe) or type(codec.pipe).__name__
    alone = run.recipe.export.what == "adapter"
    sampler = called_with(run.sampler, run.student) if alone else run.sampler
    call = pipeline_call(pipeline, sampler, codec, run.shown(1))
    scheduler = stock_scheduler(
        run.sampler, run.student.path, run.teacher.pipe.scheduler, run.teacher.family.passes
    )
    times = ", ".join(f"{time:.4g}" for time in run.sampler.times)
    return model_card(
        teacher=run.recipe.teacher,
        method=Path(run.recipe.method).stem,
        summary=module_summaries("methods").get(run.recipe.method, run.recipe.method),
        steps=run.sampler.steps,
        guidance=run.options.guidance,
        call=call,
        grid=f"`{type(scheduler).__name__}`: t = {times}",
        command=command,
        changes=run.changes,
        scores=scores,
    )


def export_student(run: Assembled, folder: Path, command: str) -> None:
    """Writes the student folder with the network's present weights."""
    export(
        run.student,
        run.sampler,
        run.teacher,
        folder,
        run.shown(4),
        card(run, command),
        source=run.source,
        options=run.recipe.export,
    )


def finish(
    run: Assembled, output: Path, trained: Finished, command: str | None, status: RunStatus
) -> RunReport:
    """Exports, verifies, evaluates, draws and reports, with the averaged weights where there are any."""
    recipe, device, origin = run.recipe, run.accelerator.device, run.origin
    command = command or str(origin["command"])
    with averaged(trained.ema):
        status.tell("finishing", "exporting the student")
        export_student(run, output / "student", command)
        status.tell("finishing", "drawing its pictures again with plain diffusers")
        proof = verify(output / "student")
        status.tell("finishing", "measuring")
        scores = _scores(run, output / "student")  # before the time and the memory that it takes are read
        report = RunReport(
            name=output.name,
            method=recipe.method,
            summary=module_summaries("methods").get(recipe.method, recipe.method),
            teacher_name=recipe.teacher,
            teacher_changes=run.changes,
            verification=str(proof),
            updates=trained.step,
            updates_planned=recipe.train.updates,
            train_seconds=round(trained.seconds, 1),
            wall_seconds=round(time.perf_counter() - run.began, 1),
            peak_memory_bytes=peak_memory(device),
            **{**scores, **origin, "command": command},
        )
        status.tell("finishing", "drawing samples")
        _samples(run, RunFolder(output).samples)
    text = for_folder(card(run, command, score_table(report)), output / "student")
    (output / "student" / "README.md").write_text(text, encoding="utf-8")
    write_report(output, report, read_stats(output))
    return report


def _scores(run: Assembled, student: Path) -> dict[str, Any]:
    """Teacher and student on the recipe's suite, as report.json has them; empty where there is no suite."""
    wanted = run.recipe.evaluate
    if wanted is False or (wanted is True and not run.embedded):
        return {"suite": None, "n": 0, "student": {"fd": {}, "clip_score": {}}}
    suite = load_suite("emoji" if wanted is True else str(wanted))
    counts, guidance = run.sampler.step_counts, run.options.guidance
    drawn = evaluate(
        student,
        suite,
        steps=counts,
        guidance=run.sampler.guidance,
        device=run.accelerator.device,
        eta=run.sampler.gamma or None,
    )
    asked = sorted({1, *counts, suite.teacher_steps})
    guided = teacher_scores(run.source, suite, steps=asked, guidance=guidance, device=run.accelerator.device)
    plain = teacher_scores(run.source, suite, steps=1, guidance=1.0, device=run.accelerator.device)
    # The teacher at one step is taken at its better guidance, so that the gap is not flattered.
    best = min(guided[1], plain[1], key=lambda scores: math.inf if scores.fd is None else scores.fd)
    teachers = {**guided, 1: best}
    full = guided[suite.teacher_steps]
    try:
        gaps = {
            str(k): gap_closed(v.fd, best.fd, full.fd)
            for k, v in drawn.scores.items()
            if not (v.fd is None or best.fd is None or full.fd is None)
        }
    except UserError as error:  # every other number stands all the same
        gaps = {}
        say(f"gap closed is left out: {error}")
    return {
        "suite": suite.label,
        "n": suite.n,
        "metrics": dict(drawn.metrics),
        "better": dict(drawn.better),
        "protocol": dict(drawn.protocol),
        "guidance": guidance,
        "teacher": by_metric(teachers),
        "student": by_metric(drawn.scores),
        "gap_closed": gaps,
        # Of the teacher at full steps; a student below 0.9 of it has lost some of what the teacher draws.
        "recall_of_teachers": {
            str(k): v.recall / full.recall
            for k, v in drawn.scores.items()
            if v.recall is not None and full.recall
        },
    }


def _samples(run: Assembled, file: Path) -> None:
    """The same prompts and seeds by the teacher at full steps, at the student's, and the student."""
    prompts, seeds, steps = run.shown(16), list(range(16)), run.sampler.steps
    guidance = run.options.guidance
    full = teacher_pictures(run.teacher, prompts, seeds, TEACHER_STEPS, guidance)
    few = teacher_pictures(run.teacher, prompts, seeds, steps, guidance)
    own = draw_as_pipeline(run.student, run.sampler, run.teacher.codec, prompts, seeds)
    rows = [
        (f"teacher, {TEACHER_STEPS} steps", to_uint8(full)),
        (f"teacher, {steps} step{'s' * (steps > 1)}", to_uint8(few)),
        (f"student, {steps} step{'s' * (steps > 1)}", to_uint8(own)),
    ]
    rows_of_pictures(rows).save(file)
