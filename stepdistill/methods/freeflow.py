"""FreeFlow: a flow map without data, by prediction along the student's own path from noise, and by correction.

"Flow Map Distillation Without Data", 2025, 2511.19428, after two summaries that agree.

- Every jump starts at the noise end, x at t = 1, and ends anywhere: X(s) = x - (t - s) u(x, t, s). There is no image,
  no pair and no noised sample, so states that a guided teacher never visits cannot enter.
- Prediction: the student's own velocity, dX/ds = u - (t - s) d_s u, is to be the teacher's at the student's own state.
  With e = dX/ds - v_T(X(s), s), u moves against w e, w = 1 / (|e|^2 / d + c)^p. The derivative is partial, z held
  fixed, and has no gradient through it: the Lagrangian equation of ``stepdistill/losses/map_equations.py``.
- Correction, on ``correction_share`` of the samples: what prediction gets wrong accumulates along s. A second network
  follows the velocity v_fake of the student's own samples x0, re-noised to x_r; -(v_fake - v_T) on x0 is the gradient
  of KL(student || teacher) up to a positive factor of r, so u moves against lambda (v_fake - v_T).
- lambda = ``correction`` times the ratio of the mean sizes of the two vectors as they are sent back, here from running
  means, so that a batch equals its parts. The law of r leans to noise, and guidance is off above
  ``correction_interval``: at high noise it over-saturates there.

Added: the correction is divided by the teacher's mean error on x_r, as in DMD (2311.18828, eq. 8), since where alpha is
small an eps network's velocity is uncertain in proportion to 1 / alpha. For K steps, jumps start at the student's own
states at ``times``, one of them drawn for each batch (the paper trains t = 1 alone). ``warm_start`` regresses on pairs.
The paper's law of s and learning rates were not at hand. Left out: a guidance scale that the student is told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.guidance import in_interval
from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.fake_score import FakeTurnOptions, denoising_loss, loss_with_gradient, turn_at
from stepdistill.losses.flow_maps import (
    FlowMapMethod,
    MapOptions,
    adaptive,
    logit_normal,
    sizes,
    teacher_velocity,
)
from stepdistill.losses.running_means import Balance


class FreeFlow(FlowMapMethod):
    """See the module's text."""

    class Options(MapOptions, FakeTurnOptions):
        guidance: float = 3.0  # of the teacher's velocity on the student's path, and of the pairs
        end_mean: float = -0.2  # of the logit of s / t
        end_deviation: float = 1.0  # of the same
        to_data: float = 0.2  # share of the prediction's samples with s = 0, and of the warm start's
        power: float = 0.5  # p of the prediction's weight; 1 in the paper, where small errors then weigh most
        offset: float = 0.01  # c of the weight
        correction: float = 1.0  # size of the correction over that of the prediction; 0.3 to 3 are alike
        correction_share: float = 0.25  # of the samples
        correction_guidance: float | None = None  # of the teacher there, where it should differ
        correction_interval: tuple[float, float] = (0.0, 0.7)  # times r at which guidance is on there
        correction_mean: float = 0.8  # of the logit of r; without high noise training fails
        correction_deviation: float = 1.0  # of the same

    options: Options

    def setup(self) -> None:
        super().setup()
        self.fake = self.roles.add("fake")
        self.balance = Balance(decay=0.95)

    def trained(self) -> dict[str, Trained]:
        return {**super().trained(), "fake": Trained("fake", follows=True)}

    def lr_ratio(self, turn: Turn) -> float:
        return self.options.fake_lr_ratio if turn.network == "fake" else super().lr_ratio(turn)

    def turn(self, step: int) -> Turn:
        return Turn(turn_at(step, self.options, self.options.warm_start), step)

    def phase(self, step: int) -> str:
        return self.options.phase(step, self.options.warm_start)

    def after_step(self, turn: Turn) -> None:
        self.balance.update()

    def prediction(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """u [B, ...] of the jumps from x at t to s, and e = dX/ds - v_T(X, s), which has no graph."""
        mean = self.student.flow_velocity(x, t, s, cond)
        now = mean.detach()
        return mean, now - self.equations.lagrangian(x, t, s, cond, now)

    @torch.no_grad()
    def field(self, x0: Tensor, r: Tensor, n: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """v_fake - v_T at the student's samples x0 [B, ...] re-noised by n [B, ...] to r [B], and mean|v - v_T|, [B],
        for the velocity v = n - x0 that the teacher is to guess."""
        options, x_r = self.options, STRAIGHT.noised(x0, n, r)
        scale = options.guidance if options.correction_guidance is None else options.correction_guidance
        guidance = in_interval(scale, r, *options.correction_interval) if scale != 1.0 else 1.0
        v = teacher_velocity(self.teacher, x_r, r, cond, guidance)
        field = self.fake.predict_on(STRAIGHT, x_r, r, cond).velocity - v
        return field, (n - x0 - v).abs().flatten(1).mean(1)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.network == "student" and turn.step < options.warm_start:
            return Loss(self.regression(batch))
        x, t = self.starts(batch)
        if turn.network == "fake":
            with torch.no_grad():
                mean = self.student.flow_velocity(x, t, torch.zeros_like(t), batch.cond)
            loss = denoising_loss(self.fake, x - per_sample(t, x) * mean, batch, options.fake_loss)
            return Loss(loss, {"denoising": loss})
        s = t * logit_normal(draws, "end", options.end_mean, options.end_deviation)
        s = torch.where(draws.uniform("to data") < options.to_data, torch.zeros_like(s), s)
        s = self.read_ends(draws, t, s)
        r = logit_normal(draws, "renoise t", options.correction_mean, options.correction_deviation)
        n = draws.normal("renoise eps", tuple(x.shape[1:]))
        corrected = draws.uniform("kind") < options.correction_share
        lam, zero = options.correction * self.balance.ratio, x.new_zeros(())
        loss, told, logs = zero, [zero.new_zeros(0)] * 2, {"residual": zero, "field": zero, "lambda": lam}
        if len(rows := (~corrected).nonzero()[:, 0]):
            mean, error = self.prediction(x[rows], t[rows], s[rows], batch.cond.rows(rows))
            apart = (mean - (mean.detach() - error)) / math.sqrt(x[0].numel())
            term = 0.5 * adaptive(apart, options.power, options.offset)  # scaled as push is
            loss = loss + len(rows) / len(x) * term
            told[0] = sizes(error) / (sizes(error).square() + options.offset) ** options.power
            logs["residual"] = sizes(error).mean()
        if len(rows := corrected.nonzero()[:, 0]):
            cond = batch.cond.rows(rows)
            mean = self.student.flow_velocity(x[rows], t[rows], torch.zeros_like(t[rows]), cond)
            x0 = x[rows] - per_sample(t[rows], x) * mean
            field, uncertain = self.field(x0, r[rows], n[rows], cond)
            field = field / per_sample(uncertain + 1e-6, x)
            loss = loss + lam * len(rows) / len(x) * loss_with_gradient(mean, field)
            told[1], logs["field"] = sizes(field), sizes(field).mean()
        self.balance.see(*told)
        return Loss(loss, logs)
