"""What a run needs of a GPU at the very least, from numbers of parameters alone: known before anything is moved there.

A plan says all of it, with what is in memory while a network is called; that takes a minute, and this no time.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from stepdistill.families import Family, known_family
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import say

MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.0}
"""Bytes of a trained weight in the optimiser."""

HELD = {"float32": 4.0, "bf16": 2.0, "master": 6.0}
"""Bytes of a trained weight, with its master."""

BASE = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes of a weight that several networks share."""


def warn_of_memory(recipe: Recipe, pipe: Any, family: Family | None, accelerator: Accelerator) -> None:
    """Says before a pipeline is moved to a GPU that the run will not fit there; of other devices nothing is said.

    Args:
        recipe: what is run.
        pipe: the teacher, as it was loaded.
        family: of the user's own, or None.
        accelerator: where it runs.
    """
    device = accelerator.device
    if device.type != "cuda" or not accelerator.is_main_process:
        return
    own = family or known_family(type(pipe).__name__)
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    sizes = {name: sum(value.numel() for value in part.parameters()) for name, part in networks.items()}
    called = [size for name, size in sizes.items() if own is not None and name.startswith(own.network)]
    loaded = sum(
        value.numel() * value.element_size() for part in networks.values() for value in part.parameters()
    )
    memory = torch.cuda.get_device_properties(device).total_memory
    network = sum(called) or max(sizes.values(), default=0)
    if (line := memory_warning(recipe, network, loaded, memory, accelerator.num_processes)) is not None:
        say(line)


def least_bytes(recipe: Recipe, network: int, processes: int = 1) -> float:
    """Bytes of the teacher and, where all weights are trained, of one student with its gradients and optimiser. No
    adapter, further network, average or decoder, and nothing of a call is counted.

    Args:
        recipe: what is run.
        network: the teacher's parameters.
        processes: that share networks out, with ``train.parallel: sharded``.
    """
    train, shares = recipe.train, bool(recipe.student.lora_rank)
    low = (train.teacher_precision or train.precision) == "bf16"
    if shares:
        plain = 2.0 if low and train.precision == "bf16" else 4.0
        needed = network * BASE.get(recipe.student.base, plain)
    else:
        gradient = 4.0 if train.weights == "float32" else 2.0
        trained = HELD[train.weights] + MOMENTS[train.optimizer] + gradient
        needed = network * ((2.0 if low else 4.0) + trained)
    return needed / (processes if train.parallel == "sharded" else 1)


def memory_warning(recipe: Recipe, network: int, loaded: int, memory: int, processes: int = 1) -> str | None:
    """A line for a run that will not fit, with a change that would take less where there is a simple one.

    Args:
        recipe, network, processes: see :func:`least_bytes`.
        loaded: bytes of the whole pipeline, as it is moved to the GPU.
        memory: bytes of the GPU.
    """
    have, needed = memory / 2**30, least_bytes(recipe, network, processes)
    plan = f"`stepdistill plan` with --memory {have:.0f}GB counts the rest and says what fits"
    if loaded > memory:
        return (
            f"warning: this run will not fit: the teacher's pipeline alone is {loaded / 2**30:.1f} GiB as it is loaded"
            f", and the GPU has {have:.1f}; {plan}"
        )
    if needed <= memory:
        return None
    counted = (
        "the teacher" if recipe.student.lora_rank else "teacher, one student, its gradients and optimiser"
    )
    said = (
        f"warning: this run will not fit: {counted} take {needed / 2**30:.1f} GiB, counted by parameters and without "
        f"what calls need, and the GPU has {have:.1f}"
    )
    for sets in _changes(recipe):
        less = least_bytes(_changed(recipe, sets), network, processes)
        if less <= memory:
            told = " ".join(f"--set {key}={value}" for key, value in sets.items())
            said += f"; with {told} {less / 2**30:.1f}"
            break
    return f"{said}; {plan}"


def _changes(recipe: Recipe) -> list[dict[str, Any]]:
    """In the order in which they cost."""
    train, found = recipe.train, list[dict[str, Any]]()
    if recipe.student.lora_rank:
        return [
            {"student.base": base} for base in ("int8", "nf4") if recipe.student.base not in ("int8", "nf4")
        ]
    if train.precision == "bf16" and train.weights == "float32" and train.parallel != "sharded":
        found.append({"train.weights": "bf16"})
    if train.optimizer == "adamw" and train.parallel != "sharded":
        found.append({"train.optimizer": "adafactor"})
    return [*found, {"train.precision": "bf16", "student.lora_rank": 64}]


def _changed(recipe: Recipe, sets: dict[str, Any]) -> Recipe:
    parts: dict[str, dict[str, Any]] = {}
    for key, value in sets.items():
        section, name = key.split(".")
        parts.setdefault(section, {})[name] = value
    sections = {name: getattr(recipe, name).model_copy(update=told) for name, told in parts.items()}
    return recipe.model_copy(update=sections)
