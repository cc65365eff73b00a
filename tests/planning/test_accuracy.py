"""What is counted on tensors without numbers is what is counted on real ones, in the same updates by the same code."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.planning.live_bytes import LiveBytes
from stepdistill.planning.plan import plan
from stepdistill.planning.table import times
from stepdistill.planning.trace import _Tracing, trace
from stepdistill.planning.traced import Trace
from stepdistill.recipes.recipe import Recipe, load_recipe

COMMON = ("data.prompts=prompts.txt", "evaluate=false", "student.output=teacher", "options.guidance=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dit")
    tiny_pipeline("dit").save_pretrained(folder)
    return str(folder)


def recipe_of(teacher: str, method: str, *sets: str) -> Recipe:
    return load_recipe(teacher=teacher, method=method, sets=[*COMMON, *sets])


def counted(recipe: Recipe) -> Trace:
    """The same on real tensors."""
    return _Tracing(recipe, "cpu", 1, torch.device("cpu"), LiveBytes(64), {}).run(False)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("dmd", ("train.batch=1",)),  # weights dominate
        ("dmd", ("student.lora_rank=4", "train.batch=64", "train.checkpointing=true")),  # activations do
        ("lcm", ("train.batch=8", "train.average=0.9")),
        ("consistency", ("train.batch=8",)),  # asks for numbers: of a path, of a grid
        ("freeflow", ("train.batch=8",)),  # which samples take which loss
        ("phased_dmd", ("train.batch=4", "train.accumulate=2", "student.times=[1.0, 0.5]")),  # which expert
    ],
)
def test_plans_count_the_bytes_of_real_tensors(teacher: str, method: str, sets: tuple[str, ...]) -> None:
    recipe = recipe_of(teacher, method, *sets)
    planned, real = trace(recipe, "cpu"), counted(recipe)
    assert planned.trained == real.trained
    for one, other in zip(planned.updates, real.updates, strict=True):
        assert (one.flops, one.passes, one.peak) == (other.flops, other.passes, other.peak)
    assert planned.picture == real.picture and planned.picture is not None
    assert planned.picture.total > sum(planned.held.values())


def test_processes_that_share_calls_divide_the_gpus(teacher: str) -> None:
    with pytest.raises(UserError, match="context_parallel is 2, which does not divide 3 GPUs"):
        plan(recipe_of(teacher, "lcm", "train.batch=6", "train.context_parallel=2"), gpus=3)


@pytest.mark.parametrize(
    ("guidance", "calls", "solver"), [(1, 1, "dpm++2m"), (2, 2, "dpm++2m"), (2, 2, "heun")]
)
def test_pairs_cost_what_calls_of_the_teacher_do(
    teacher: str, guidance: int, calls: int, solver: str
) -> None:
    """A student's update of one call in whole float32 is three of the network: forward, and back to what it saw and to
    its weights. Of Heun's steps each calls twice but the last."""
    sets = ("options.pairs=6", "options.pair_steps=5", f"options.pair_solver={solver}", "train.batch=4")
    found = plan(recipe_of(teacher, "reflow", *sets, f"options.guidance={guidance}"), device="cpu")
    student = next(each for each in found.trace.updates if each.passes == {"student*": 1.0})
    assert found.trace.teacher_call == pytest.approx(calls * student.flops / 4 / 3, rel=0.1)
    made = 6 * (9 if solver == "heun" else 5) * found.trace.teacher_call
    assert found.pairs == 6
    assert found.pair_hours["h100"] / found.hours["h100"] == pytest.approx(
        made / (found.recipe["updates"] * found.flops)
    )
    assert times(found)[0].startswith("6 pairs of the teacher, unless they are there, if a GPU reaches")


def test_pictures_to_measure_by_cost_what_the_teachers_steps_do(teacher: str) -> None:
    """In its full steps and in those of lcm's students (1, 2, 4, 8), of a size at which 256 are drawn."""
    found = plan(
        recipe_of(teacher, "lcm", "train.batch=4", "evaluate=true", "options.guidance=1"), device="cpu"
    )
    per_call = found.trace.teacher_call / (found.recipe["updates"] * found.flops)
    assert found.pictures == 256
    ratio = found.picture_hours["h100"] / found.hours["h100"]
    assert ratio == pytest.approx(256 * (25 + 1 + 2 + 4 + 8) * per_call)
    assert times(found)[-1].startswith(
        "256 pictures of the teacher to measure by, unless they are there, if a"
    )
    sets = ("evaluate=true", "against_teacher.pictures=8", "against_teacher.steps=4", "student.steps=2")
    found = plan(recipe_of(teacher, "dmd", "train.batch=4", *sets), device="cpu")
    per_call = found.trace.teacher_call / (found.recipe["updates"] * found.flops)
    assert found.picture_hours["h100"] / found.hours["h100"] == pytest.approx(8 * (4 + 2 + 1) * per_call)


def test_without_pairs_no_hours_of_them_are_said(teacher: str) -> None:
    found = plan(recipe_of(teacher, "tbcm", "train.batch=4"), device="cpu")
    assert found.pairs == 0 and not found.pair_hours and len(times(found)) == 1
