"""What is said of memory before a run, by arithmetic on numbers of parameters."""

from __future__ import annotations

import pytest

from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.training.memory_needed import least_bytes, memory_warning

SDXL = 2_567_463_684  # parameters of its UNet
GIB = 2**30


def recipe_of(*sets: str) -> Recipe:
    return load_recipe(teacher="sdxl", method="dmd", sets=["data.prompts=prompts.txt", *sets])


@pytest.mark.parametrize(
    ("sets", "bytes_of_a_weight"),
    [
        ((), 4 + 4 + 8 + 4),  # teacher, student, two moments, gradient
        (("train.precision=bf16",), 2 + 4 + 8 + 4),
        (("train.precision=bf16", "train.weights=bf16"), 2 + 2 + 8 + 2),
        (("train.precision=bf16", "train.weights=master"), 2 + 6 + 8 + 2),
        (("train.precision=bf16", "train.weights=bf16", "train.optimizer=adafactor"), 2 + 2 + 2),
        (("student.lora_rank=64",), 4),
        (("student.lora_rank=64", "train.precision=bf16"), 2),
        (("student.lora_rank=64", "train.precision=bf16", "student.base=nf4"), 0.5),
    ],
)
def test_a_weight_takes_what_it_is_held_in(sets: tuple[str, ...], bytes_of_a_weight: float) -> None:
    assert least_bytes(recipe_of(*sets), SDXL) == bytes_of_a_weight * SDXL


def test_a_run_that_will_not_fit_is_told_what_takes_less() -> None:
    whole = recipe_of("train.precision=bf16")
    line = memory_warning(whole, SDXL, 4 * SDXL, 40 * GIB)
    assert line is not None and "\n" not in line
    assert "43.0 GiB" in line and "--set train.weights=bf16 33.5" in line and "--memory 40GB" in line
    line = memory_warning(whole, SDXL, 4 * SDXL, 11 * GIB)
    assert line is not None and "student.lora_rank=64 4.8" in line
    assert memory_warning(whole, SDXL, 4 * SDXL, 44 * GIB) is None
    line = memory_warning(recipe_of("student.lora_rank=64"), SDXL, 4 * SDXL, 8 * GIB)
    assert line is not None and "9.6 GiB as it is loaded" in line
