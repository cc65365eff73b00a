"""Parts of a run that save themselves: each says what it is as named tensors, and goes back to it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from stepdistill.training.checkpoint import load_optimizer_state, optimizer_state
from stepdistill.training.sharded_files import Like


class Part(Protocol):
    """A part of a run. Of its tensors a process may hold a part; what it loads is whole, or held as
    :func:`held_like_part` says."""

    def state(self) -> dict[str, Tensor]:
        """All that it is, by name."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        ...


class ModulePart:
    """A module beside the networks: heads, running means."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def load(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(state)


class OptimizerPart:
    """An optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state(self) -> dict[str, Tensor]:
        return optimizer_state(self.optimizer)

    def load(self, state: dict[str, Tensor]) -> None:
        load_optimizer_state(self.optimizer, state)


def held_like_part(part: Part) -> Like:
    """How a part of a run holds the tensors that it loads: those of an optimiser that has made no step yet as its
    parameters, all others as its present ones."""
    own = part.state()
    groups = part.optimizer.param_groups if isinstance(part, OptimizerPart) else []
    parameters = [parameter for group in groups for parameter in group["params"]]

    def like(name: str, shape: torch.Size) -> Tensor | None:
        if not parameters:
            return own.get(name)
        index, _, key = name.partition(".")
        return parameters[int(index)] if key != "step" and shape == parameters[int(index)].shape else None

    return like
