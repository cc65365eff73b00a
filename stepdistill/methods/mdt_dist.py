"""MDT-dist: a student whose velocity leads to clean data, and which is its own fake score.

"Few-step Flow for 3D Generation via Marginal-Data Transport Distillation", 2025, 2509.04406, on pictures.

- The student is a flow map of jumps to clean data alone, u(x, t) = u(x, t, 0).
- Velocity matching: |u - sg[u*]|^2 at noised latents, u* = v - t D, where v is the teacher's guided velocity and D
  how u changes along it: MeanFlow's identity at s = 0. The paper divides D by |D| + 0.1, |.| over a whole sample
  (``normalised``): then u* stays within t of v, and the exact map is not its zero.
- Velocity distillation: x0 = x - t u(x, t) of the noise that drawings start from, noised anew to x_r; x0 moves along
  sg[u(x_r, r) - u*(x_r, r)], which is (x0_teacher - x0_student) / r: DMD's field with the student's own mean velocity
  in the place of a fake score, which velocity matching keeps true. No second network follows anybody.
- First velocity matching alone, for ``matching_alone`` updates (ours), then both.

Differs from the paper: one guidance scale for both terms, on our usual scale (theirs are 40 and 100, for the sparse
conditions of 3-D shapes); times are logit-normal (1, 1) as there; one step alone, the jump to clean data. Further steps
of such jumps differ in length, which the networks that are exported cannot say. Added: ``warm_start`` on pairs.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.path import per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import mean_size, rms
from stepdistill.losses.fake_score import loss_with_gradient
from stepdistill.losses.flow_maps import FlowMapMethod, JumpOptions, adaptive, logit_normal


class MDTDist(FlowMapMethod):
    """See the module's text."""

    class Options(JumpOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        same: float = 0.0  # share of samples with s = t: plain velocity matching
        to_data: float = 1.0  # share of samples whose jump ends in clean data
        power: float = 0.0  # p of the weight of velocity matching, which the paper has not
        time_mean: float = 1.0  # of the logit of the times, of both terms
        time_deviation: float = 1.0  # of the same
        normalised: bool = True  # the derivative over its length
        distillation_weight: Annotated[float, Field(ge=0)] = 1.0  # of velocity distillation
        matching_alone: Annotated[int, Field(ge=0)] = 0  # updates after the warm start without it

    options: Options

    def setup(self) -> None:
        super().setup()
        if len(self.times) > 1:
            raise UserError(
                f"student.times is {list(self.times)}, but mdt_dist learns jumps to clean data alone, and a drawing in "
                "several steps makes others: set student.times=[1.0], or take meanflow, whose jumps end anywhere"
            )

    def phase(self, step: int) -> str:
        if step < self.options.warm_start:
            return "warm start"
        return "velocity matching, distillation" if self.distils(step) else "velocity matching"

    def distils(self, step: int) -> bool:
        """Whether velocity distillation acts at an update."""
        options = self.options
        return options.distillation_weight > 0 and step >= options.warm_start + options.matching_alone

    @torch.no_grad()
    def target(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor, share: float) -> Tensor:
        """u* [B, ...] of jumps from x at t to s, where u is ``now``; ``share`` of the derivative counts."""
        v, rate = self.equations.along(x, t, s, cond)
        whole = self.equations.eulerian(x, t, s, cond, now, along=(v, rate))
        change = v - whole  # (t - s) D
        if self.options.normalised:
            length = torch.linalg.vector_norm(change.flatten(1), dim=1) / (t - s).clamp_min(1e-6)  # |D|, [B]
            change = change / per_sample(length + 0.1, x)
        return v - share * change

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        start = logit_normal(draws, "t", options.time_mean, options.time_deviation)
        x, _, t, s, cond = self.points(batch, start, start)
        share = self.share(turn.step)
        now = self.student.flow_velocity(x, t, s, cond)
        error = now - self.target(x, t, s, cond, now, share)
        loss = adaptive(error, options.power, options.offset) / error[0].numel()
        logs = {"residual": rms(error)}
        if self.distils(turn.step):
            own, field = self.distillation(batch, share)
            loss = loss + options.distillation_weight * 2 * loss_with_gradient(own, field)
            logs["field"] = mean_size(field)
        return Loss(loss, {**logs, **self.derivative.logs()})

    def distillation(self, batch: Batch, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """u where drawings start, with its graph, and what it should move against, both [B, ...]."""
        options, draws, cond = self.options, batch.draws, batch.cond
        x, t = self.beginning(batch.noise)
        own = self.student.flow_velocity(x, t, torch.zeros_like(t), cond)
        with torch.no_grad():
            x0 = x - per_sample(t, x) * own
            r = logit_normal(draws, "renoise t", options.time_mean, options.time_deviation)
            r = (self.last * r).clamp_min(self.least)
            x_r = STRAIGHT.noised(x0, draws.normal("renoise eps", tuple(x.shape[1:])), r)
            zero = torch.zeros_like(r)
            now = self.student.flow_velocity(x_r, r, zero, cond)
            return own, now - self.target(x_r, r, zero, cond, now, share)
