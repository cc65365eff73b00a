"""Decoupled MeanFlow: a flow map out of the teacher's own network, whose late blocks alone are told where a jump ends.

Lee et al. 2025, "Decoupled MeanFlow: Turning Flow Models into Flow Maps for Accelerated Sampling", 2510.24474, in its
form with a teacher:

- u(x, t, s) = decoder(encoder(x, t), s), with one embedding of time and no new weights. At s = t it is the teacher, bit
  for bit (``second_time: late_blocks``, stepdistill/families/_late_blocks.py).
- Half of the loss is on velocities, u(x, r, r) against the guided v(x, r), and half on MeanFlow's identity, u(x, t, s)
  against sg[v - (t - s) Du/Dt], each at times of its own: r is a sigmoid of N(0, 1), t and s are the later and the
  earlier of sigmoids of N(0.4, 1) and N(-1.2, 1).
- Either is l = log(|e|^2 / e^w + c) + w, |.|^2 the mean over a sample's elements, c = 0.01 and w(r, r), w(t, s) learnt,
  linear in sinusoids of both times, 0 at the start. So written, as read from the authors' code at second hand, it is
  log(|e|^2 + c e^w): a Cauchy loss, the weight of ``meanflow`` at its paper's p = 1. Nothing holds w, which falls at
  the pace of the learning rate, and with it what is left of c: ``adaptive: false`` leaves it at 0.

A student goes into its stock class: what late blocks say of the ends of its own jumps, one or several, is written
into the layers that read their time, and is then said exactly. At times other than ``student.times`` it is not a map.

Start values of ours: a U-Net's late blocks are its way up; the paper has transformers alone, of 28 blocks the last 8.
DiT's output layer, told s in the paper, is told t, as it embeds the class too. Added: ``warm_start`` on pairs, jumps
from where drawings start and to clean data. Left out: training without a teacher; its interval of guidance, [0, 0.7],
which is ``guidance_interval``; QK-norm.
"""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.families._second_time import sinusoid
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.flow_maps import FlowMapMethod, MapOptions, PointOptions, logit_normal
from stepdistill.networks.student import SecondTime


class LogVariance(nn.Module):
    """w(t, s) [B], linear in sinusoids of both times; 0 at the start."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width, self.last = width, nn.Linear(2 * width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        waves = torch.cat([sinusoid(1000 * time.float(), self.width) for time in (t, s)], 1)
        value: Tensor = self.last(waves)[:, 0]
        return value


class DMF(FlowMapMethod):
    """See the module's text."""

    class Options(PointOptions, MapOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        second_time: SecondTime = "late_blocks"  # how the student is told where a jump ends
        same: float = 0.0  # share of jumps with s = t, beside the half of the loss that has no others
        offset: PositiveFloat = 0.01  # c of the loss
        adaptive: bool = True  # whether w is learnt
        velocity_mean: float = 0.0  # of the logit of r
        start_mean: float = 0.4  # of the logit of the one of t and s that is later in the mean
        end_mean: float = -1.2  # of that of the other
        time_deviation: float = 1.0  # of all three

    options: Options

    def setup(self) -> None:
        super().setup()
        self.log_variance = LogVariance() if self.options.adaptive else None

    def trained(self) -> dict[str, Trained]:
        return {"student": Trained("student", self.log_variance)}

    def distance(self, error: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """l of errors [B, ...] of jumps from t to s [B]; a scalar."""
        w = torch.zeros_like(t) if self.log_variance is None else self.log_variance(t, s)
        size = error.flatten(1).square().mean(1)
        return torch.log(size + self.options.offset * w.exp()).mean()

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        r, a, b = (
            logit_normal(draws, name, mean, options.time_deviation)
            for name, mean in (
                ("r", options.velocity_mean),
                ("a", options.start_mean),
                ("b", options.end_mean),
            )
        )
        x, x0, t, s, cond = self.points(batch, a, b)
        along = self.equations.along(x, t, s, cond)
        r = r.clamp(self.least, self.last)
        x_r = STRAIGHT.noised(x0, draws.normal("r eps", tuple(x0.shape[1:])), r)
        still = self.student.flow_velocity(x_r, r, r, cond) - self.velocity(x_r, r, cond)
        now = self.student.flow_velocity(x, t, s, cond)
        jump = now - self.equations.eulerian(x, t, s, cond, now, 1.0, along)
        loss = (self.distance(still, r, r) + self.distance(jump, t, s)) / 2
        logs = {
            "residual": rms(jump),
            "velocity": rms(still),
        }
        return Loss(loss, {**logs, **self.derivative.logs()})
