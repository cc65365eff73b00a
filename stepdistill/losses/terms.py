"""Terms that any method's student can be given beside its own loss, by the recipe's ``terms``.

- Regression on cached pairs (Yin et al. 2023, 2311.18828, eq. 9): the student's clean prediction from a state of the
  teacher's trajectory against the trajectory's end. Of several experts, each at the times of its own calls.
- Perceptual: the same two, decoded, as unit features of an image network; |a - b|^2 = 2 - 2 cos. A student that is
  scored in the very network it learnt from scores better than it is.
- GAN (Yin et al. 2024, 2405.14867, 4.3): the student's samples against real images, told apart by a head on the frozen
  teacher's features of both, noised. Its turns alternate with the method's steps, which therefore take twice as many.
- Reward (stepdistill/losses/reward_term.py): how good the student's samples are, upwards.

The last two read clean samples: the method's own, where its loss made them, else those of a drawing. They are refused
where a network of the student draws none, as all but the last of several experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, Predicted, Trained
from stepdistill.losses.distances import DistanceName, distance
from stepdistill.losses.gan import FeatureGan
from stepdistill.losses.regression import ends
from stepdistill.networks.denoiser import Denoiser


class Shown:
    """What the terms are shown of a student in one batch: each made when it is first asked for, for all of them.

    Args:
        method: whose student.
        batch: its noise, conditions and pairs.
        span: the calls of the network whose turn it is, see ``Trained``.
        found: what the method says of the batch.
    """

    def __init__(self, method: Method, batch: Batch, span: tuple[int, int] | None, found: Loss) -> None:
        self.batch = batch
        self._method, self._span, self._found = method, span, found

    @cached_property
    def sample(self) -> Tensor:
        """The student's clean samples [B, ...] of the batch's noise and conditions, with a graph."""
        made = self._found.sample
        return self._method.sample(self.batch) if made is None else made

    def drawn(self, last_call: bool) -> Tensor:
        """The same; without ``last_call`` as its sampler draws them, with the graph of all calls."""
        if last_call:
            return self.sample
        batch, sampler = self.batch, self._method.sampler()
        return sampler.draw(self._method.student, batch.noise, batch.cond, batch.fresh, through=True)

    @property
    def predicted(self) -> Predicted:
        """The clean predictions that the method's loss is of, where its ``shows`` says so."""
        assert self._found.predicted is not None
        return self._found.predicted

    def own_gradient(self, x0: Tensor) -> Tensor:
        """The gradient of the method's own loss in clean samples or predictions [B, ...] that it has made; zero where
        it has none, as in a warm start."""
        value = self._found.value
        if not (value.requires_grad and x0.requires_grad):
            return torch.zeros_like(x0)
        (gradient,) = torch.autograd.grad(value, x0, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x0) if gradient is None else gradient

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The ends that the student sees from states of the pairs' trajectories, with a graph, and the pairs' own."""
        # The states that pairs keep are those of the method's pair times, which may be more than the student's own.
        method = self._method
        return ends(method.student, (method.times[0], *method.pair_times()), self.batch, self._span)


class Term(nn.Module, ABC):
    """A part of a student's loss beside its method.

    Class attributes:
        name: ``terms.<name>_weight`` of a recipe is its weight.

    Attributes:
        of_samples: whether it reads clean samples, which not every network of a student draws.
        reads: what of a method's ``shows`` it cannot do without.
        after: the method's steps before it acts.
        lr_ratio: learning rate of its critic over train.lr.
    """

    name: ClassVar[str]
    of_samples: bool = False
    reads: frozenset[str] = frozenset()
    after: int = 0
    lr_ratio: float = 1.0

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def value(self, shown: Shown) -> Tensor:
        """A scalar, a mean over samples, that is to fall."""

    def critic(self) -> Trained | None:
        """What the term trains in turns of its own, named ``term <name>``."""
        return None

    def critic_loss(self, shown: Shown) -> Tensor:
        """The critic's loss, a scalar; what it is shown of the student has no graph."""
        raise NotImplementedError(f"the term {self.name} has no critic")


class RegressionTerm(Term):
    """See the module's text."""

    name = "regression"

    def __init__(self, weight: float, kind: DistanceName) -> None:
        super().__init__(weight)
        self.kind: DistanceName = kind

    def value(self, shown: Shown) -> Tensor:
        return distance(*shown.ends, self.kind)


class PerceptualTerm(Term):
    """See the module's text.

    Args:
        weight: of the term.
        embed: latents [B, ...] to unit features [B, D] of their images, with a graph.
    """

    name = "perceptual"

    def __init__(self, weight: float, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weight)
        self.embed = embed

    def value(self, shown: Shown) -> Tensor:
        seen, wanted = shown.ends
        with torch.no_grad():
            target = self.embed(wanted)
        return (self.embed(seen) - target).square().sum(1).mean()


class GanTerm(Term):
    """See the module's text.

    Args:
        weight: of the generator's loss.
        eye: the frozen network whose features the head reads.
        lr_ratio: learning rate of the head over train.lr.
    """

    name = "gan"
    of_samples = True

    def __init__(self, weight: float, eye: Denoiser, lr_ratio: float) -> None:
        super().__init__(weight)
        self.gan, self.lr_ratio = FeatureGan(eye), lr_ratio

    def value(self, shown: Shown) -> Tensor:
        return self.gan.for_generator(shown.sample, shown.batch)

    def critic(self) -> Trained:
        return Trained(extra=self.gan, follows=True)

    def critic_loss(self, shown: Shown) -> Tensor:
        batch = shown.batch
        with torch.no_grad():
            x = shown.sample
        return self.gan.for_discriminator(x, cast(Examples, batch.images), batch)
