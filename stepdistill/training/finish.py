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
from stepdistill.export.card import for_folder
from stepdistill.export.verify import verify
from stepdistill.networks.averages import averaged
from stepdistill.networks.own_call import TEACHER_STEPS
from stepdistill.networks.pictures import draw_as_pipeline, teacher_pictures, to_uint8
from stepdistill.pages.sheets import png_of_rows
from stepdistill.system.log import read_stats, say
from stepdistill.system.memory import peak_memory
from stepdistill.system.run_folder import RunFolder, RunStatus
from stepdistill.training.assemble import Assembled
from stepdistill.training.exporting import card, export_student, prompts_of, student_hash, summary_of
from stepdistill.training.health import Vitals, health_of
from stepdistill.training.report import score_table, write_report
from stepdistill.training.run import Finished
from stepdistill.training.run_report import RunReport


def finish(run: Assembled, output: Path, trained: Finished, status: RunStatus) -> RunReport:
    """Exports, verifies, evaluates, draws and reports, with the averaged weights where there are any."""
    recipe, device, starts = run.recipe, run.accelerator.device, trained.starts
    with averaged(trained.ema):
        status.tell("finishing", "exporting the student")
        export_student(run, output / "student", starts)
        status.tell("finishing", "drawing its pictures again with plain diffusers")
        proof = verify(output / "student")
        status.tell("finishing", "measuring")
        scores = _scores(run, output / "student")  # before the time and the memory that it takes are read
        wall, memory = time.perf_counter() - run.began, peak_memory(device)
        status.tell("finishing", "drawing samples")
        drawn, teachers = _samples(run, RunFolder(output).samples)
        health = health_of(read_stats(output), trained.step, drawn, teachers, trained.skipped)
        report = RunReport(
            name=output.name,
            method=recipe.method,
            summary=summary_of(recipe.method),
            teacher_name=recipe.teacher,
            teacher_changes=run.changes,
            verification=str(proof),
            updates=trained.step,
            updates_planned=recipe.train.updates,
            train_seconds=round(trained.seconds, 1),
            wall_seconds=round(wall, 1),
            peak_memory_bytes=memory,
            resumes=list(starts[1:]),
            prompts=prompts_of(run),
            student_sha256=student_hash(run),
            health=health,
            **{**scores, **run.origin, "command": starts[0].command},
        )
    status.tell("finishing", "writing the report", health=health.verdict)
    text = for_folder(card(run, starts, score_table(report), health), output / "student")
    (output / "student" / "README.md").write_text(text, encoding="utf-8")
    write_report(output, report)
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


def _samples(run: Assembled, file: Path) -> tuple[Vitals, Vitals]:
    """The same prompts and seeds by the teacher at full steps, at the student's, and the student; and how varied and
    saturated the student's are, and the first teacher's."""
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
    file.write_bytes(png_of_rows(rows, prompts))
    return Vitals.of(own), Vitals.of(full)
