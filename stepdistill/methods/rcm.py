"""rCM: continuous-time consistency, and beside it a little of DMD's field, which brings fine detail back.

Zheng et al. 2025, "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency" (rCM),
2510.08431; the consistency of sCM (scm.py), the field of DMD2 (dmd.py).

- Consistency follows the teacher's trajectories, as a forward divergence does: nothing is lost, and small errors add up
  to soft details. DMD's field is a reverse divergence: sharp, and by itself less diverse.
- Consistency turn: sCM's loss without its learnt weight. In the warm-up y alone fades in, and the derivative is there
  at once: g = -cos(a) sqrt(1 - r^2 sin^2(a)) (F - v) - cos(a) sin(a) (r y + dF/da), at r = 1 sCM's.
- Beside it ``score_weight`` times DMD's loss of x, once the warm-up is over: x is the clean prediction of the last of 1
  to K calls, at random descending times with fresh noise between, the first at pure noise; it alone has a graph. The
  teacher is guided there, too.
- Fake turns: the diffusion loss on sg[x], ``fake_updates`` times for each update of the student; none in the warm-up.

``score_weight`` is between means of elements, and holds at any resolution: the paper's 0.01 is between sums, the
tangent there of norm 1, which for d elements is 0.01 sqrt(d) here. The times of a rollout, and those at which the
scores are compared, are uniform before a flow teacher's shift, as the paper's are for video. Left out: samples whose
tangent is not finite, which are zeroed there; two-time students (sCTM).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.continuous_time import ContinuousConsistency, ContinuousOptions, trig_velocity
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import (
    FakeLoss,
    FakeScoreOptions,
    denoising_loss,
    loss_with_gradient,
    turn_at,
    views_of,
)
from stepdistill.networks.sampler import Sampler


class RCM(ContinuousConsistency):
    """See the module's text."""

    class Options(ContinuousOptions, FakeScoreOptions):
        tangent_warmup: int = (
            0  # updates over which the tangent fades in, by consistency alone: 0 to 1000 in the paper
        )
        adaptive: bool = False  # the learnt weight of sCM
        score_weight: Annotated[float, Field(ge=0)] = (
            0.1  # of DMD's loss; 0: consistency alone, no fake score
        )
        fake_updates: int = 4  # updates of the fake network per student update
        fake_lr_ratio: float = 0.2  # learning rate of the fake network over train.lr
        fake_loss: FakeLoss = "output"  # of a velocity |x0 - x|^2 / t^2, the paper's up to its path

    options: Options

    def setup(self) -> None:
        super().setup()
        options = self.options
        self.fake = self.roles.add("fake", rank=options.fake_lora_rank) if options.score_weight else None

    def trained(self) -> dict[str, Trained]:
        follower = {"fake": Trained("fake", follows=True)} if self.fake is not None else {}
        return {**super().trained(), **follower}

    def turn(self, step: int) -> Turn:
        alone = self.fake is None
        return Turn("student" if alone else turn_at(step, self.options, self.options.tangent_warmup), step)

    def phase(self, step: int) -> str:
        if step < self.options.tangent_warmup:
            return "tangent fades in"
        return "whole tangent" if self.fake is None else self.options.phase(step, self.options.tangent_warmup)

    def lr_ratio(self, turn: Turn) -> float:
        return self.options.fake_lr_ratio if turn.network == "fake" else 1.0

    def sampler(self) -> Sampler:
        usual = super().sampler()
        return Sampler(usual.times, self.options.renoise is not False, usual.grid)

    @torch.no_grad()
    def tangent(self, now: Prediction, F: Tensor, cond: Condition, share: float) -> Tensor:
        if share == 1:
            return super().tangent(now, F, cond, share)
        a = per_sample(self.student.path.angle(now.t), F)
        lead = (1 - (share * torch.sin(a)).square()).sqrt()
        moved = share * self.state(now, a) + self.slope(now, cond)
        return -torch.cos(a) * lead * (F - trig_velocity(now)) - torch.cos(a) * torch.sin(a) * moved

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, ...] at the last of 1 to K calls, as many for the whole batch, each
        sample's at times of its own; the last alone has a graph."""
        draws, path, renoise = batch.draws, self.student.path, self.sampler().renoise
        x, t = batch.noise, torch.ones(draws.count, device=batch.noise.device)
        with torch.no_grad():
            for call in range(draws.shared_integer("rollout", len(self.times))):
                said = self.student.predict(x, t, batch.cond)
                s = torch.minimum(
                    t, path.shifted(draws.uniform(f"rollout {call}", *self.options.score_times))
                )
                x = path.noised(said.x0, batch.fresh(call), s) if renoise else said.at(s)
                t = s
        return self.student.predict(x, t, batch.cond).x0

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options = self.options
        if turn.network == "fake":
            assert self.fake is not None
            with torch.no_grad():
                x = self.generate(batch)
            loss = denoising_loss(self.fake, x, batch, options.fake_loss)
            return Loss(loss, {"denoising": loss})
        loss, logs = self.consistency(turn.step, batch)
        if self.fake is None or turn.step < options.tangent_warmup:
            return Loss(loss, logs)
        x = self.generate(batch)
        with torch.no_grad():
            field = views_of(self.fake, self.teacher, x, batch, options, options.score_scale).field
        logs["field"] = mean_size(field)
        return Loss(loss + options.score_weight * loss_with_gradient(x, field), logs)
