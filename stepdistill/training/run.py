"""The state of a run between two steps, and how it is saved and restored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses.objective import Objective
from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import say
from stepdistill.training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_state,
    save_checkpoint,
)
from stepdistill.training.identity import differences, identity


@dataclass(frozen=True)
class Finished:
    """What training leaves besides the weights in the method.

    Attributes:
        seconds: time in the loop, over all resumes.
        step: optimiser steps done.
        ema: the student's averaged weights, or None.
    """

    seconds: float
    step: int
    ema: Ema | None


class Run:
    """The state of a run between two steps, and how it is saved and restored.

    Args:
        objective: what is trained.
        recipe: kept in every checkpoint and compared on resume.
        folder: the run folder.
        inputs: ``Data.identity``, kept in every checkpoint and compared on resume; None, where nothing is trained,
            compares nothing.
    """

    def __init__(
        self, objective: Objective, recipe: Recipe, folder: Path, inputs: dict[str, str] | None = None
    ) -> None:
        self.objective, self.recipe, self.options, self.inputs = objective, recipe, recipe.train, inputs
        self.checkpoints = folder / "checkpoints"
        options = recipe.train
        self.trained = {name: objective.weights(name) for name in objective.trained}
        self.optimizers = {
            name: torch.optim.AdamW(
                parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
            )
            for name, parameters in self.trained.items()
        }
        self.roles = objective.method.roles
        averaged = options.ema or options.ema_power
        weights = self.roles.weights(objective.trained[objective.averaged].role or "")
        self.ema = Ema(weights, options.ema, options.ema_power) if averaged else None
        self.modules = {"method": objective.method, "terms": objective.terms}
        self.step, self.seconds = 0, 0.0
        self.last_good: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are done, or the time for them is spent."""
        budget = self.options.budget_seconds
        return self.step >= self.options.steps or 0 < budget <= self.seconds

    def _states(self) -> dict[str, dict[str, Tensor]]:
        """What is kept of the run beside optimisers and averages; the teacher's own weights are no part of it."""
        return {"roles": self.roles.state()} | {part: net.state_dict() for part, net in self.modules.items()}

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors = {part: own for part, own in self._states().items() if own}
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer-{name}"] = optimizer_state(optimizer)
        if self.ema:
            tensors["ema"] = self.ema.state()
        state = {"recipe": identity(self.recipe).model_dump(mode="json"), "seconds": self.seconds}
        state |= {"inputs": self.inputs, "folder": str(Path.cwd())}
        self.last_good = save_checkpoint(self.checkpoints, self.step, tensors, state, self.options.keep)

    def restore(self) -> None:
        """Goes back to the last checkpoint.

        Raises:
            UserError: when there is none, it is damaged, or it is of another recipe or of other inputs.
        """
        last = check_resume(self.checkpoints, self.recipe)
        if self.inputs is not None:
            self._check_inputs(last)
        tensors, state = load_checkpoint(last)
        for part, own in self._states().items():
            if odd := sorted(tensors.get(part, {}).keys() ^ own.keys()):
                raise UserError(
                    f"--resume: {last} was made by another version of the {part} ({odd[0]} differs)"
                )
        self.roles.load(tensors["roles"])
        for part, module in self.modules.items():
            module.load_state_dict(tensors.get(part, {}))
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, tensors[f"optimizer-{name}"])
        if self.ema:
            self.ema.load(tensors["ema"])
        self.step, self.seconds, self.last_good = state["step"], state["seconds"], last

    def _check_inputs(self, last: Path) -> None:
        state, inputs = read_state(last), self.inputs or {}
        kept = state.get("inputs")
        if kept is None:
            say(
                f"--resume: {last} is from before checkpoints knew prompts, images and teacher: none was compared"
            )
            return
        named = {"teacher": self.recipe.teacher, "data.prompts": self.recipe.data.prompts}
        named["data.images"] = self.recipe.data.images
        if changed := [name for name in inputs if kept.get(name) != inputs[name]]:
            what = ", ".join(f"{name} ({named[name]})" if named[name] else name for name in changed)
            raise UserError(
                f"--resume: {what} changed since step {state['step']}: put back what it was, or train into another "
                "--output"
            )


def check_resume(checkpoints: Path, recipe: Recipe) -> Path:
    """The last checkpoint, when it was made with this recipe; reads no weights.

    Raises:
        UserError: when there is none, or its recipe differs, naming the keys.
    """
    found = checkpoints_in(checkpoints)
    if not found:
        raise UserError(
            f"--resume: there is no checkpoint in {checkpoints}; leave --resume out to start anew"
        )
    made_with = Recipe.model_validate(read_state(found[-1])["recipe"])
    changed = differences(identity(made_with), identity(recipe))
    if changed:
        raise UserError(
            f"--resume: the recipe differs from the one {found[-1]} was made with, in {', '.join(changed)}: "
            "put it back, or train into another --output"
        )
    return found[-1]
