"""run_recipe(): recipe -> teacher, student, method, data -> train -> student folder, proven -> report.

Nothing here imports torch before the cheap checks are made: what is wrong with a recipe or a folder is said at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import DEFAULT_METHOD, Recipe, load_recipe
from stepdistill.system.log import say
from stepdistill.system.processes import launched, told
from stepdistill.system.run_folder import RunFolder, RunStatus
from stepdistill.system.whole import load_whole
from stepdistill.training.identity import ResolvedRecipe, changes, resolve, resolved_yaml
from stepdistill.training.interruption import preemptible
from stepdistill.training.launcher import as_launched
from stepdistill.training.own_files import as_begun, check_own_files, copies, keep_own_files
from stepdistill.training.preflight import check_evaluation, check_output, check_recipe
from stepdistill.training.record import recorded
from stepdistill.training.run_report import RunReport, read_report

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Distilled:
    """What a run left.

    Attributes:
        folder: the run folder.
        student: the student's diffusers folder.
        report: report.json; None in all processes but the first.
    """

    folder: Path
    student: Path
    report: RunReport | None


def distill(
    teacher: str | Path | DiffusionPipeline = "emoji",
    method: str | None = None,
    output: str | Path = "runs/distilled",
    *,
    recipe: str | Path | None = None,
    sets: Sequence[str] = (),
    resume: bool = False,
) -> Distilled:
    """Distils a teacher into a few-step student.

    Args:
        teacher: an embedded teacher, a diffusers folder, a hub id, or a pipeline object.
        method: a method's name or a path to one, ``./my_method.py``; default the recipe's, dmd without a recipe.
        output: the run folder.
        recipe: a shipped recipe or a YAML file; default the method's quick recipe on the embedded teacher.
        sets: assignments laid over the recipe, such as ``"train.updates=500"``.
        resume: go on with the run in ``output``.

    Raises:
        UserError: for anything the caller can mend.
    """
    named = isinstance(teacher, str | Path)
    pipeline = None if named else cast("DiffusionPipeline", teacher)
    wanted = load_recipe(
        recipe,
        teacher=str(teacher) if named else type(teacher).__name__,
        method=method or (None if recipe else DEFAULT_METHOD),
        sets=sets,
    )
    return run_recipe(wanted, output=Path(output), resume=resume, pipeline=pipeline)


def run_recipe(
    recipe: Recipe,
    *,
    output: Path,
    resume: bool = False,
    command: str | None = None,
    pipeline: DiffusionPipeline | None = None,
) -> Distilled:
    """Runs a recipe from start to report; in every process, where several are launched.

    Args:
        recipe: what to do.
        output: the run folder.
        resume: go on from its last checkpoint.
        command: the command line to state in card and report; default this process's.
        pipeline: the teacher, where it is an object and not what ``recipe.teacher`` names.

    Raises:
        UserError: for anything the caller can mend.
    """
    output = output.resolve() if output.is_symlink() else output
    if told().main:
        check_output(output, resume=resume)
        if resume:
            check_own_files(recipe, output)
    if pipeline is None:
        check_recipe(recipe, output if resume else None)
    else:
        check_evaluation(recipe)
    recipe = as_launched(recipe)
    resolved = resolve(recipe)

    if recipe.train.parallel == "sharded" and not resolved.kind.same_calls:
        raise UserError(
            f"train.parallel is sharded, but {recipe.method} calls its networks for some samples alone, and "
            "sharded ones are called by all processes together: set train.parallel=replicated"
        )

    if not told().main:
        with preemptible():
            return _run(resolved, output, resume, command, pipeline, None)
    status = RunStatus(output, recipe.train.updates, recipe.train.budget_seconds)
    with recorded(output, status, command or "stepdistill.distill()"), preemptible():
        say(recipe.announced)
        return _run(resolved, output, resume, command, pipeline, status)


def _run(
    resolved: ResolvedRecipe,
    output: Path,
    resume: bool,
    command: str | None,
    pipeline: DiffusionPipeline | None,
    status: RunStatus | None,
) -> Distilled:
    """The run itself; ``status`` is the main process's."""
    import torch
    from accelerate import Accelerator

    from stepdistill.networks.averages import averaged
    from stepdistill.networks.own_call import TEACHER_STEPS
    from stepdistill.training.assemble import assemble
    from stepdistill.training.cost import passes_before
    from stepdistill.training.exporting import started_by
    from stepdistill.training.finish import finish
    from stepdistill.training.loop import train
    from stepdistill.training.parallel import parallel_of
    from stepdistill.training.previews import Previews
    from stepdistill.training.run import check_resume
    from stepdistill.training.scores import against_teacher, check_suite
    from stepdistill.training.tracking import Tracking, check_tracker
    from stepdistill.training.training_data import training_data

    load_whole()
    recipe, place = resolved.recipe, RunFolder(output)
    if resume:
        check_resume(place, recipe)
    check_tracker(recipe.train.tracker)
    processes = launched()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=recipe.train.tracker,
        project_dir=str(output / "tracker"),
    )
    parallel = parallel_of(
        recipe.train.parallel, processes, accelerator.device, recipe.train.context_parallel
    )
    if status:
        status.tell("preparing", "loading the teacher")
    run = assemble(resolved, accelerator, pipeline)
    check_suite(run)
    if status:
        place.begin()
        keep_own_files(recipe, output)
        place.recipe.write_text(resolved_yaml(resolved), encoding="utf-8")
    against = against_teacher(run)
    if against is not None:  # before encoders leave the device
        if status:
            status.tell("preparing", "drawing the teacher's pictures that the student is measured against")
        against.prepare(parallel.processes)
    if status:
        status.tell("preparing", "reading prompts and images, drawing pairs")
    data = training_data(run, output)
    preview = None
    if recipe.train.preview_every and (parallel.main or parallel.calls_together):
        if status:
            status.tell("preparing", "drawing the teacher's pictures")
        guidance, shown = run.options.guidance, run.shown(16)
        kept = place if parallel.main else None
        codec = run.encoded(shown)
        preview = Previews(kept, run.student, run.sampler, run.teacher, shown, guidance, TEACHER_STEPS, codec)
    tracking = None
    if recipe.train.tracker:
        named = {"method": recipe.method, "teacher": recipe.teacher}
        tracking = Tracking(accelerator, place, named | changes(resolved))
    trained = train(
        run.objective,
        data,
        run.recipe,
        output,
        accelerator,
        parallel=parallel,
        resume=resume,
        preview=preview.look if preview else None,
        status=status,
        start=started_by(run, command),
        before=None if resume or not parallel.main else passes_before(run, data),
        track=tracking.row if tracking else None,
    )
    if not parallel.in_parts:
        parallel.gather(())
    else:
        # Every process: what is exported is then whole, and in the main one alone.
        with averaged(trained.ema):
            students = run.student.experts or (run.student,)
            parallel.gather([each.net for each in (*students, run.teacher.denoiser)])
        trained = replace(trained, ema=None)
    accelerator.wait_for_everyone()
    report = finish(run, output, trained, status, against) if status else None
    if tracking:
        tracking.end(report)
    accelerator.wait_for_everyone()
    return Distilled(output, place.student, report)


def export_run(run: Path, output: Path | None = None, sets: Sequence[str] = ()) -> Path:
    """Writes and verifies the student of a run's last checkpoint, finished or not.

    Args:
        run: the run folder.
        output: where to; default ``run/student``.
        sets: assignments laid over the recipe's section ``export``, such as ``"export.what=adapter"``.

    Raises:
        UserError: when there is no run, no checkpoint, or the student does not verify.
    """
    RunFolder(run).check_layout()
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no recipe.yaml")

    import torch
    from accelerate import Accelerator

    from stepdistill.export.verify import verify
    from stepdistill.networks.averages import averaged
    from stepdistill.training.assemble import assemble
    from stepdistill.training.exporting import export_student, student_hash
    from stepdistill.training.report import score_table
    from stepdistill.training.run import Run

    kept = [f"{key}={json.dumps(str(copy))}" for key, copy in copies(run).items() if key != "terms.reward"]
    resolved = resolve(as_begun(load_recipe(run / "recipe.yaml", sets=[*kept, *sets]), run))
    assembled = assemble(resolved, Accelerator(cpu=not torch.cuda.is_available()))
    state = Run(assembled.objective, assembled.recipe, run)
    state.restore()
    state.widen()
    folder = output or run / "student"
    report = RunFolder(run).report
    found = read_report(report) if report.is_file() else None
    scores, health = "", None
    with averaged(state.ema):
        # What was measured holds for these weights alone, however they are exported.
        if isinstance(found, RunReport) and found.student_sha256 == student_hash(assembled):
            scores, health = score_table(found), found.health
        export_student(assembled, folder, state.starts, scores, health)
    verify(folder)
    return folder
