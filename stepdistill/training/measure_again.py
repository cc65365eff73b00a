"""A finished run's student measured against its teacher's pictures, with its pipeline as it lies in the folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.against_teacher import AgainstTeacher
from stepdistill.evaluation.sample import call_arguments, draws_alone
from stepdistill.evaluation.teacher_pictures import batches
from stepdistill.families.watching import frames_of
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.own_call import OwnCall, own_call
from stepdistill.networks.pictures import strip, to_uint8
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.files import check_writable
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.preflight import check_recipe
from stepdistill.training.report import write_report
from stepdistill.training.run_report import RunReport, read_report
from stepdistill.training.scores import against_teacher


def measure_again(
    run: Path, counts: Sequence[int] = (), pictures: int | None = None, output: Path | None = None
) -> RunReport:
    """The run's report with the scores of its student against its teacher's pictures, written down.

    Args:
        run: the folder of a finished run.
        counts: step counts; none are all that the student draws in.
        pictures: how many of each; None is as the recipe says.
        output: folder for report.json; None writes that of the run anew, and its page.

    Raises:
        UserError: it is no finished run, its teacher is embedded, or a step count that its student was not trained for.
    """
    report = read_report(run)
    if not isinstance(report, RunReport):
        raise UserError(f"{run} is an evaluation, not a run")
    folder = find_pipeline(run)
    own = own_call(folder)
    if own is None:
        raise UserError(f"{folder} is no student: it has no manifest of its proof; export it again")
    for count in counts:
        own.check_steps(count)
    more = [] if pictures is None else [f"against_teacher.pictures={pictures}"]
    recipe = load_recipe(RunFolder(run).recipe, sets=["evaluate=true", *more])
    check_recipe(recipe, run)
    if output is not None:
        check_writable(output)
    assembled = assemble(resolve(recipe), Accelerator(cpu=not torch.cuda.is_available()))
    against = against_teacher(assembled, counts)
    if against is None:
        raise UserError(
            f"the teacher {recipe.teacher} is embedded: measure its students with a suite, such as emoji"
        )
    against.prepare()
    pipe, _ = load_pipeline(folder, assembled.teacher.device)
    scores = against.scores(lambda steps: _drawn(against, pipe, own, steps))
    kept = report.model_dump(by_alias=True, exclude={"recall_of_teachers"})
    found = RunReport.model_validate({**kept, **scores})
    if output is None:
        write_report(run, found)
    else:
        (output / "report.json").write_text(found.text(), encoding="utf-8")
    return found


def _drawn(
    against: AgainstTeacher, pipe: object, own: OwnCall, steps: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The student's pictures by its pipeline's own call."""
    every = range(against.count)
    alone = [[i] for i in every] if draws_alone(pipe, own, against.prompts) else None
    for rows in alone or batches(every, against.teacher):
        generators = [torch.Generator("cpu").manual_seed(against.seeds[i]) for i in rows]
        arguments = call_arguments(pipe, own, [against.prompts[i] for i in rows], steps)
        with torch.no_grad():
            drawn = pipe(**arguments, generator=generators, output_type="np", return_dict=False)[0]  # type: ignore[operator]
        yield rows, to_uint8(strip(frames_of(drawn)))
