"""The end of a run: the student exported, proven, measured and drawn, and what is reported of it."""

from __future__ import annotations

import time
from pathlib import Path

from stepdistill.evaluation.against_teacher import AgainstTeacher
from stepdistill.evaluation.video_pipelines import frame_rate
from stepdistill.export.card import for_folder
from stepdistill.export.verify import NotVerified, verify
from stepdistill.networks.averages import averaged
from stepdistill.networks.own_call import TEACHER_STEPS
from stepdistill.networks.pictures import frames_as_pipeline, teacher_frames, to_uint8
from stepdistill.pages.sheets import png_of_rows
from stepdistill.pictures.given import words_of
from stepdistill.system.log import read_stats, say
from stepdistill.system.memory import peak_memory
from stepdistill.system.run_folder import RunFolder, RunStatus, moving
from stepdistill.training.assemble import Assembled
from stepdistill.training.exporting import card, export_student, prompts_of, student_hash, summary_of
from stepdistill.training.health import Vitals, health_of
from stepdistill.training.moving import strips_and_videos, write_moving
from stepdistill.training.previews import given_row
from stepdistill.training.report import score_table, write_report
from stepdistill.training.run import Finished
from stepdistill.training.run_report import NetworkPasses, RunReport
from stepdistill.training.scores import student_scores


def finish(
    run: Assembled,
    output: Path,
    trained: Finished,
    status: RunStatus,
    against: AgainstTeacher | None = None,
) -> RunReport:
    """Exports, verifies, evaluates, draws and reports, with the averaged weights where there are any; ``against`` has
    the teacher's pictures where the student is measured against them."""
    recipe, device, starts = run.recipe, run.accelerator.device, trained.starts
    with averaged(trained.ema):
        status.tell("finishing", "exporting the student")
        export_student(run, output / "student", starts)
        status.tell("finishing", "drawing its pictures again with plain diffusers")
        try:
            proof = str(verify(output / "student"))
        except NotVerified as late:  # what was trained for days is still measured and reported
            proof = f"not verified: {late}"
            say(f"warning: {proof}")
        status.tell("finishing", "measuring")
        # Before the time and the memory that it takes are read.
        scores = student_scores(run, output / "student", against)
        wall, memory = time.perf_counter() - run.began, peak_memory(device)
        status.tell("finishing", "drawing samples")
        drawn, teachers = _samples(run, RunFolder(output).samples)
        health = health_of(
            read_stats(output), trained.step, drawn, teachers, trained.skipped, trained.worries
        )
        report = RunReport(
            name=output.name,
            method=recipe.method,
            summary=summary_of(run),
            teacher_name=recipe.teacher,
            teacher_changes=run.changes,
            verification=proof,
            updates=trained.step,
            updates_planned=recipe.train.updates,
            train_seconds=round(trained.seconds, 1),
            wall_seconds=round(wall, 1),
            peak_memory_bytes=memory,
            passes={who: NetworkPasses(**own) for who, own in trained.passes.by_network.items()},
            warm_start_of=trained.warm_start_of,
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


def _samples(run: Assembled, file: Path) -> tuple[Vitals, Vitals]:
    """The same prompts and seeds by the teacher at full steps, at the student's, and the student; and how varied and
    saturated the student's are, and the first teacher's."""
    prompts, seeds, steps = run.shown(16), list(range(16)), run.sampler.steps
    guidance = run.options.guidance
    codec, few = run.encoded(prompts), f"{steps} step{'s' * (steps > 1)}"
    drawn = {
        f"teacher, {TEACHER_STEPS} steps": teacher_frames(
            run.teacher, prompts, seeds, TEACHER_STEPS, guidance, codec
        ),
        f"teacher, {few}": teacher_frames(run.teacher, prompts, seeds, steps, guidance, codec),
        f"student, {few}": frames_as_pipeline(run.student, run.sampler, codec, prompts, seeds),
    }
    seen = [(label, *strips_and_videos(frames)) for label, frames in drawn.items()]
    rows = [*given_row(codec, prompts), *((label, to_uint8(strips)) for label, strips, _ in seen)]
    file.write_bytes(png_of_rows(rows, words_of(prompts)))
    write_moving(moving(file), [(label, videos) for label, _, videos in seen], frame_rate(codec.pipe))
    return Vitals.of(seen[-1][1]), Vitals.of(seen[0][1])
