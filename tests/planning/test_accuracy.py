"""What is counted on tensors without numbers is what is counted on real ones, in the same updates by the same code."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.planning.live_bytes import LiveBytes
from stepdistill.planning.plan import plan
from stepdistill.planning.trace import Trace, _Tracing, trace
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


def test_processes_that_share_calls_divide_the_gpus(teacher: str) -> None:
    with pytest.raises(UserError, match="context_parallel is 2, which does not divide 3 GPUs"):
        plan(recipe_of(teacher, "lcm", "train.batch=6", "train.context_parallel=2"), gpus=3)
