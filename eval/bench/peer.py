"""What peers.py compares: updates of two toolkits on one network, on the same numbers or on numbers of their own."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.data.batches import Data
from stepdistill.diffusion.draws import Draws
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Method, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.recipes.recipe import Recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import resolve
from stepdistill.training.parallel import take_turn
from stepdistill.training.training_data import training_data

STEP = 10
"""The update whose random numbers both toolkits are given."""


@dataclass(frozen=True)
class Update:
    """One network's update in one toolkit.

    Attributes:
        given: the loss on the numbers that both toolkits are given.
        drawn: the loss at an update, with the toolkit's own random numbers.
        trained: the weights that get gradients, in the network's order.
        networks: whose passes are counted.
        after: what follows the optimiser, such as a target's average.
    """

    given: Callable[[], Tensor]
    drawn: Callable[[int], Tensor]
    trained: Sequence[nn.Parameter]
    networks: Sequence[nn.Module]
    after: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Pair:
    """The same update in this package and in a peer, on copies of the same weights."""

    name: str
    ours: Update
    theirs: Update
    batch: int


@dataclass(frozen=True)
class Given(Draws):
    """Draws of which some are stated, by their streams."""

    stated: Mapping[str, Tensor] = field(default_factory=dict)

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.stated[stream] if stream in self.stated else super().uniform(stream, low, high)

    def integers(self, stream: str, high: int) -> Tensor:
        return self.stated[stream] if stream in self.stated else super().integers(stream, high)


class Ours:
    """A method of this package at an embedded teacher, its networks moved off the teacher's.

    Args:
        method, teacher: their names.
        batch: samples.
        options: of the method; its own defaults, and not a recipe's, stand beside them.
    """

    def __init__(self, method: str, teacher: str, batch: int, options: Mapping[str, Any]) -> None:
        said = {"method": method, "teacher": teacher, "options": dict(options)}
        rest = {"student": {"output": "teacher"}, "train": {"average": 0, "batch": batch}}
        recipe = Recipe.model_validate({**said, **rest})
        self.job: Assembled = assemble(resolve(recipe), Accelerator(cpu=not torch.cuda.is_available()))
        self.size, self._folder = batch, tempfile.TemporaryDirectory()
        self.data: Data = training_data(self.job, Path(self._folder.name))
        objective = self.job.objective
        self._weights = {name: objective.weights(name) for name in objective.trained}
        torch.manual_seed(0)
        for role in self.method.roles.names:
            move(self.method.roles[role].net)

    @property
    def method(self) -> Method:
        return self.job.method

    def batch(self, stated: Mapping[str, Tensor] | None = None) -> Batch:
        """The batch of the given update, some of its draws stated."""
        found = self.data.batch(STEP, 0, self.size, self.size)
        draws = Given(**vars(found.draws), stated=stated or {})
        return replace(found, draws=draws)

    def net(self, role: str) -> nn.Module:
        """A copy of a role's network, or the teacher's."""
        teacher = self.job.teacher.denoiser
        return copy.deepcopy((teacher if role == "teacher" else self.method.roles[role]).net)

    def null(self) -> Condition:
        """The unconditional condition of a batch."""
        assert self.job.teacher.null is not None
        return self.job.teacher.null.repeat(self.size)

    def update(self, name: str, batch: Batch) -> Update:
        """The update of one of the method's networks; ``batch`` is the given one."""
        roles, turn = self.method.roles, Turn(name, STEP)

        def loss(of: Batch) -> Tensor:
            take_turn(self._weights, name)
            return self.job.objective.loss(turn, of)[0]

        return Update(
            lambda: loss(batch),
            lambda step: loss(self.data.batch(step, 0, self.size, self.size)),
            list(roles[name].net.parameters()),
            [self.job.teacher.denoiser.net, *(roles[role].net for role in roles.names)],
            lambda: self.job.objective.after_step(turn),
        )


def move(net: nn.Module) -> None:
    """Moves weights by a twentieth of their deviation: networks that are alike have no field between them."""
    for weight in net.parameters():
        if weight.numel() > 1:
            weight.data.add_(0.05 * weight.data.std() * torch.randn_like(weight))


class Called(nn.Module):
    """A network that is called with a Condition by whatever name, as this package's families call it.

    Args:
        net: the network.
        like: whose family calls it.
    """

    def __init__(self, net: nn.Module, like: Denoiser) -> None:
        super().__init__()
        self.net, self._family = net, like.family

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Condition) -> Tensor:
        return self._family.call(self.net, hidden_states, timestep.float(), encoder_hidden_states)


@contextmanager
def handed_out(*noise: Tensor) -> Iterator[None]:
    """Within it, ``torch.randn_like`` returns these, one after the other."""
    left = list(noise)
    with patch("torch.randn_like", lambda like, **_: left.pop(0)):
        yield
    assert not left, f"{len(left)} of {len(noise)} tensors of noise were not asked for"
