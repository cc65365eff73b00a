"""What a key of an earlier version, or another trainer's name, is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.errors import UserError
from stepdistill.methods import find_method, method_options
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.recipes.renamed import ELSEWHERE, RENAMED, SCHEDULES
from stepdistill.recipes.term_options import TermOptions
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.system.shipped import method_names

EMPTY = Path(__file__).parents[1] / "toys" / "empty.yaml"


def refused(assignment: str, method: str = "dmd") -> str:
    with pytest.raises(UserError) as caught:
        method_options(load_recipe(EMPTY, method=method, sets=[assignment]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keys() -> set[str]:
    """Every key that a recipe of a shipped method can have."""
    found = {name for name in Recipe.model_fields if name not in ("train", "student", "data", "terms")}
    for name in ("train", "student", "data", "terms", "export"):
        section = Recipe.model_fields[name].annotation
        found |= {f"{name}.{key}" for key in section.model_fields}  # type: ignore[union-attr]
    for method in method_names():
        found |= {f"options.{key}" for key in find_method(method).Options.model_fields}
    return found


def test_old_names_are_gone_and_new_ones_there() -> None:
    known = keys()
    assert not RENAMED.keys() & known and "options.schedule" not in known
    assert set(RENAMED.values()) | set(SCHEDULES.values()) <= known
    assert {key.partition("=")[0] for key in ELSEWHERE.values()} <= known


def test_no_option_of_a_method_is_called_as_a_key_of_train_or_terms() -> None:
    taken = TrainOptions.model_fields.keys() | TermOptions.model_fields.keys()
    for method in method_names():
        assert not taken & find_method(method).Options.model_fields.keys(), method


@pytest.mark.parametrize(
    ("assignment", "method", "answer"),
    [
        ("train.steps=5", "dmd", "--set: train.steps is called train.updates"),
        ("options.ema=0", "lcm", "--set: options.ema is called options.target_decay"),
        ("options.schedule=ect", "consistency", "--set: options.schedule is called options.curriculum"),
        ("train.batch_size=5", "dmd", "--set: train.batch_size is not a key here: set train.batch"),
        ("learning_rate=1", "dmd", "--set: learning_rate is not a key here: set train.lr"),
        ("train.gradient_checkpointing=true", "dmd", "set train.checkpointing"),
        ("options.rank=4", "dmd", "--set: options.rank is not a key here: set student.lora_rank"),
        ("train.epochs=4", "dmd", "there are no epochs, length is said in updates: set train.updates"),
        (
            "train.precision=fp32",
            "dmd",
            "--set: train.precision is 'fp32' and should be 'float32' or 'bf16' (write float32)",
        ),
        ("train.precision=fp16", "dmd", "(float16 is not offered; the 16-bit format is bf16)"),
        ("train.precision=bfloat16", "dmd", "(write bf16)"),
    ],
)
def test_an_old_or_foreign_name_is_answered_with_todays(assignment: str, method: str, answer: str) -> None:
    assert answer in refused(assignment, method)
