"""A reward's guidance becomes part of the weights: the student says what its teacher would say under that guidance.

After Euphonium, 2026, 2602.04928, which guides rollouts by a reward's gradient and internalises that; its equation for
the second was not at hand, and the objective here is a guess.

- Rollout: the student's own K steps, with a share ``eta`` of fresh noise, up to one of them, drawn for the whole batch.
- Target at the state: the frozen teacher's prediction, moved up the gradient g of the reward R of its clean prediction,
  taken through the teacher to the state. The loss is the mean square of the difference in velocity.
- ``move: tilt`` (ours): the score is moved by g / beta, so x0 <- x0 + (sigma^2 / alpha) g / beta. Where R of the clean
  prediction is linear in it this is the flow of p exp(R / beta) on Gaussians, with no error of its own.
- ``move: unit``: the step's end is moved by ``length`` times g / |g|, the released form. There |g| is that of a whole
  batch; here it is each sample's, so that a sample does not depend on those beside it.

Differs from the paper: tilted are score and velocity together, where the paper tilts the score of the noise's drift
alone; no policy gradient; the target is of the teacher, not of a past student, so that a longer run tilts no further.
At pure noise of a flow path a state says nothing of clean data: an exact prediction has no slope there, a network's
slope is its error, and ``tilt`` leaves the prediction as it is. The student is a teacher of many steps still: distil it
afterwards.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Method, MethodOptions, Turn
from stepdistill.losses.rollout import Visit, squared, visits
from stepdistill.networks.sampler import Sampler

LEAST_ALPHA = 1e-3
"""The share of data in a state below which it is pure noise."""


class Internalise(Method):
    """See the module's text."""

    default_times = uniform_times(8)

    class Options(MethodOptions):
        group: ClassVar[str] = "on-policy"

        move: Literal["tilt", "unit"] = "tilt"  # how the reward's gradient moves the target
        beta: PositiveFloat = 0.1  # of exp(R / beta), for tilt
        length: PositiveFloat = 0.1  # by which a step's end moves, for unit
        eta: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of fresh noise in rollouts

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"reward"}

    options: Options

    @property
    def leaves_teacher(self) -> bool:
        return True

    def sampler(self) -> Sampler:
        return Sampler(self.times, False)

    def gradient(self, visit: Visit, batch: Batch) -> tuple[Prediction, Tensor, Tensor]:
        """The teacher's prediction at a state, the gradient [B, ...] of its reward in the state, and the reward [B]."""
        assert self.rewards is not None
        with torch.enable_grad():
            x = visit.x.detach().requires_grad_()
            said = self.teacher.predict_with_input_gradient(
                x, visit.t, batch.cond, guidance=self.options.guidance
            )
            reward = self.rewards.total(said.x0, batch.prompt)
            (slope,) = torch.autograd.grad(reward.sum(), x)
        plain = Prediction(said.path, said.x0.detach(), said.eps.detach(), said.t)
        return plain, slope, reward.detach()

    def target(self, visit: Visit, batch: Batch) -> tuple[Prediction, Tensor]:
        """What the student is to say at a state, and the reward [B] of what the teacher says there."""
        said, slope, reward = self.gradient(visit, batch)
        path = said.path
        if self.options.move == "unit":
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-8)
            moved = said.at(visit.s) + self.options.length * slope / per_sample(size, slope)
            return path.through(visit.x, visit.t, moved, visit.s), reward
        alpha, sigma = path.alpha_sigma(visit.t)
        told = alpha >= LEAST_ALPHA
        up = per_sample(torch.where(told, sigma / self.options.beta, 0.0), slope) * slope
        x0 = said.x0 + per_sample(torch.where(told, sigma / alpha, 0.0), slope) * up
        return Prediction(path, x0, said.eps - up, said.t), reward

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        calls = 1 + batch.draws.shared_integer("exit", len(self.times))
        visit = visits(self.student, self.sampler(), batch, batch.cond, self.options.eta, calls)[-1]
        target, reward = self.target(visit, batch)
        own = self.student.predict(visit.x, visit.t, batch.cond)
        return Loss(squared(own.velocity - target.velocity).mean(), {"reward": reward.mean()})
