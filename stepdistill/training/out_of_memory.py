"""What is said where a GPU's memory ends: the settings on which it hangs, and the command that says what fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import Recipe


@contextmanager
def memory_explained(recipe: Recipe, folder: Path, device: torch.device) -> Iterator[None]:
    """Within it an out-of-memory error is a UserError with the recipe's settings and what can be changed.

    Args:
        recipe: what is run.
        folder: of the run, where its ``recipe.yaml`` lies.
        device: where it runs.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_told(recipe, folder, device)) from error


def _told(recipe: Recipe, folder: Path, device: torch.device) -> str:
    train, memory = recipe.train, ""
    if device.type == "cuda":
        memory = f" --memory {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f}GB"
    names = ("batch", "accumulate", "checkpointing", "precision", "weights", "optimizer", "parallel")
    settings = " ".join(f"train.{name}={getattr(train, name)}" for name in names)
    plan = f"`stepdistill plan {folder / 'recipe.yaml'}{memory}`"
    return (
        f"{device} has no memory left for {recipe.method} with {settings} "
        f"student.lora_rank={recipe.student.lora_rank}: {plan} says what fits; the last checkpoint stays, and "
        "--resume takes another train.checkpointing or train.parallel"
    )
