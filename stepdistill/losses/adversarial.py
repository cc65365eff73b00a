"""What methods share whose student learns from a discriminator on the frozen teacher's features.

The student's samples, of the step at which a rollout exits, are told from real images by heads at several depths of the
teacher, which is given both noised, with their conditions. Turns of the heads precede the student's, which may start by
regression on pairs: where distributions do not overlap, a discriminator points nowhere.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, MethodOptions, Trained, Turn
from stepdistill.losses.fake_score import rollout
from stepdistill.losses.gan import FeatureGan
from stepdistill.losses.regression import WarmStartOptions, regression, warm_start_rate
from stepdistill.networks.sampler import Sampler

NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdversarialOptions(WarmStartOptions):
    """Options of every AdversarialMethod."""

    group: ClassVar[str] = "adversarial"

    discriminator_updates: PositiveInt = 1  # updates of the heads per update of the student
    discriminator_lr_ratio: PositiveFloat = 1.0  # learning rate of the heads over train.lr
    penalty_weight: NotNegative = 0.0  # gamma of R1, in the features of real images; 0 leaves it out
    penalty_every: PositiveInt = (
        16  # turns of the heads between two of R1, which then weighs so many times as much
    )
    renoise: bool | None = None  # fresh noise between steps, or the predicted; default by the path
    warm_start_betas: tuple[Beta, Beta] | None = None  # of AdamW in the warm start; default those of train

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"images"}


class AdversarialMethod(Method):
    """A method with a discriminator on the teacher's features: everything but the loss of a student's sample beside the
    GAN's, :meth:`beside`, and its own :meth:`discriminator`."""

    starts_below = True
    options: AdversarialOptions

    @classmethod
    def shared_start(cls, options: MethodOptions) -> int:
        plain = cls.regression is AdversarialMethod.regression and cls.turn is AdversarialMethod.turn
        if not plain or not isinstance(options, AdversarialOptions):
            return 0
        return (
            0 if options.warm_start_betas else options.warm_start
        )  # with betas of its own it is nobody else's

    def setup(self) -> None:
        self.gan = self.discriminator()

    @abstractmethod
    def discriminator(self) -> FeatureGan:
        """The heads."""

    def trained(self) -> dict[str, Trained]:
        return {**super().trained(), "discriminator": Trained(extra=self.gan, follows=True)}

    def turn(self, step: int) -> Turn:
        since, cycle = step - self.options.warm_start, self.options.discriminator_updates + 1
        student = since < 0 or since % cycle == cycle - 1
        return Turn("student" if student else "discriminator", step)

    def phase(self, step: int) -> str:
        if not self.options.warm_start:
            return ""
        return "warm start" if step < self.options.warm_start else "adversarial"

    def lr_ratio(self, turn: Turn) -> float:
        if turn.network == "discriminator":
            return self.options.discriminator_lr_ratio
        return warm_start_rate(turn.step, self.options)

    def betas(self, turn: Turn) -> tuple[float, float] | None:
        return self.options.warm_start_betas if turn.step < self.options.warm_start else None

    def sampler(self) -> Sampler:
        renoise = self.options.renoise
        return Sampler(
            self.times, not isinstance(self.student.path, FlowPath) if renoise is None else renoise
        )

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        return rollout(self.student, self.sampler(), batch)

    def sample(self, batch: Batch) -> Tensor:
        return self.generate(batch)

    def regression(self, batch: Batch) -> Tensor:
        """The distance to x of what the student sees of it from a state of its trajectory, one of K at random."""
        return regression(self.student, self.times, batch, self.options.pair_distance)

    def beside(self, x: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """What else is minimised of the student's samples x [B, C, H, W], by name, with its weight."""
        return {}

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if turn.network == "discriminator":
            return self.discriminator_loss(turn, batch)
        if turn.step < self.options.warm_start:
            return Loss(self.regression(batch))
        x = self.generate(batch)
        loss = self.gan.for_generator(x, batch)
        logs = {"gan": loss, "x_std": x.detach().std()}
        for name, (weight, value) in self.beside(x, batch).items():
            logs[name] = value
            loss = loss + weight * value
        return Loss(loss, logs, x)

    def discriminator_loss(self, turn: Turn, batch: Batch) -> Loss:
        """The heads' loss, and now and then R1."""
        with torch.no_grad():
            x = self.generate(batch)
        options, images = self.options, cast(Examples, batch.images)
        loss = self.gan.for_discriminator(x, images, batch)
        logs = {"discriminator": loss}
        updates, place = divmod(turn.step - options.warm_start, options.discriminator_updates + 1)
        if (
            options.penalty_weight
            and (updates * options.discriminator_updates + place) % options.penalty_every == 0
        ):
            logs["penalty"] = self.gan.gradient_penalty(images, batch)
            loss = loss + options.penalty_weight * options.penalty_every * logs["penalty"]
        return Loss(loss, logs)
