"""Consistency distillation: neighbours on a trajectory of the teacher have the same clean end.

Song et al. 2023, "Consistency Models" (CM), 2303.01469; Song and Dhariwal 2023, "Improved Techniques for Training
Consistency Models" (iCT), 2310.14189; Geng et al. 2024, "Consistency Models Made Easy" (ECT), 2406.14548.

- Noise levels are sigma / alpha, as in EDM, on whatever path the teacher has; the highest stands for pure noise.
- Loss: d(f(x_t, t), f_target(x_r, r)) with x_r one step of the teacher's solver from x_t to the next lower level of
  Karras' grid, target weights an EMA of the student's. ``solver: none`` takes x_r from the same x0 and eps (CM's
  consistency training), and a squared residual of the exact map then falls with h^2 instead of h^6 or h^4.
- f is x0, and the identity at the last level; on a discrete table with the scalings of diffusers' LCMScheduler.
- iCT: ``solver: none, target_decay: 0, weight: true, law: lognormal, grid: 10, double_every: K'``: a lognormal index,
  the weight 1 / (t - r) in levels, the distance sqrt(|r|^2 + c^2) - c with one norm a sample, and a grid that doubles
  every K' = K / (log2(s1 / s0) + 1) of K updates, from s0 = ``grid`` to s1 = ``grid_max``.
- ECT: ``curriculum: ect, target_decay: 0, weight: true, huber: 0`` and ``solver: none``, or a solver to distil: t is
  lognormal, r = max(0, t (1 - n(t) / q^(stage+1))). Its late stages never reach clean data and are held by f alone, as
  x0 = x at t = 0: not with networks that return x0.

Left out: LPIPS, which is for pixels; CM's schedule of the EMA decay; equal dropout in both calls (students have none).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.diffusion.solvers import SOLVERS
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import (
    SAMPLER_GRID,
    SourceOptions,
    Target,
    consistency_function,
    ect_lower,
    examples,
    karras,
    last_time,
    lognormal_law,
    noised,
)
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.distances import pseudo_huber, rms
from stepdistill.networks.sampler import Sampler


class Consistency(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(SourceOptions):
        solver: Literal["heun", "ddim", "euler", "none"] = "heun"  # the teacher's step
        curriculum: Literal["karras", "ect"] = "karras"  # pairs of levels
        sigma_min: float = 0.002  # lowest level sigma / alpha, in CM
        sigma_max: float = 80.0  # highest, in CM
        rho: float = 7.0  # of Karras' grid, in CM
        grid: int = 17  # its intervals: N = 18 levels for CM on CIFAR-10; 10 at the start of iCT
        grid_max: int = 1280  # up to which they double, in iCT
        double_every: int = 0  # updates of each grid (K') or each stage of ECT; 0: there is one
        law: Literal["uniform", "lognormal"] = "uniform"  # of the interval's index; lognormal in iCT
        log_mean: float = -1.1  # of the lognormal law, in iCT and ECT on CIFAR-10
        log_deviation: float = 2.0  # its deviation in the logarithm
        q: float = 2.0  # by which ECT's relative gap shrinks in each stage
        weight: bool = False  # by 1 / (t - r) in levels, in iCT and ECT
        huber: float | None = 0.00054  # c over the square root of the dimension in iCT; null: squared
        target_decay: float = (
            0.9  # decay of the target network, in CM with L2; 0: the student itself, in iCT and ECT
        )
        noise_share: float = 0.0  # share of samples put at pure noise, where every drawing starts

    options: Options

    def setup(self) -> None:
        self.target = Target(self.roles, self.options.target_decay)
        path = self.student.path
        ends = torch.tensor([last_time(path), 1.0])
        first, last = path.angle(ends).tolist()
        lowest = self.options.sigma_min if self.options.curriculum == "karras" else 0.0
        self.low = math.tan(max(first, math.atan(lowest)))
        self.high = math.tan(min(last, math.atan(self.options.sigma_max)))

    def sampler(self) -> Sampler:
        return Sampler(self.times, True, SAMPLER_GRID)

    def time_of(self, level: Tensor) -> Tensor:
        """The times [B] of levels sigma / alpha [B]; the ends of their range are the ends of the path."""
        t = self.student.path.time_of(torch.atan(level))
        t = torch.where(level >= self.high * (1 - 1e-5), torch.ones_like(t), t)
        return torch.where(
            level <= self.low * (1 + 1e-5), torch.full_like(t, last_time(self.student.path)), t
        )

    def stage(self, step: int) -> int:
        """How often the grid has doubled, or the gap has shrunk."""
        return step // self.options.double_every if self.options.double_every else 0

    def grid(self, step: int) -> Tensor:
        """The levels between which pairs are taken, ascending, [n + 1]."""
        intervals = min(self.options.grid * 2 ** min(self.stage(step), 30), self.options.grid_max)
        return karras(self.low, self.high, intervals, self.options.rho)

    def levels(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The upper and the lower level of each sample's pair at the method's step, [B] each."""
        options, draws = self.options, batch.draws
        start = draws.uniform("start") < options.noise_share
        if options.curriculum == "karras":
            grid = self.grid(step).to(start.device)
            i = (draws.uniform("interval") * (len(grid) - 1)).long()
            if options.law == "lognormal":
                law = lognormal_law(grid, options.log_mean, options.log_deviation)
                i = torch.searchsorted(law.cumsum(0), draws.uniform("interval"), right=True)
            i = torch.where(start, len(grid) - 2, i.clamp(max=len(grid) - 2))
            return grid[i + 1], grid[i]
        t = (options.log_mean + options.log_deviation * draws.normal("level", ())).exp()
        t = torch.where(start, self.high, t.clamp(2 * self.low, self.high))
        return t, ect_lower(t, options.q, self.stage(step)).clamp_min(self.low)

    @torch.no_grad()
    def neighbour(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        """The teacher's x_r [B, C, H, W]; the step to clean data is a DDIM step, as EDM's sampler ends."""

        def predict(x: Tensor, time: Tensor) -> Prediction:
            return self.teacher.predict(x, time, cond, guidance=self.options.guidance)

        now = predict(x_t, t)
        x_r = SOLVERS[self.options.solver](predict, x_t, now, None, r)
        return torch.where(per_sample(r <= 0, x_t), now.at(r), x_r)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        source, options, path = examples(batch, self.options.source), self.options, self.student.path
        eps = batch.draws.normal("eps", tuple(source.x0.shape[1:]))
        upper, lower = self.levels(batch, turn.step)
        t, r = self.time_of(upper), self.time_of(lower)
        x_t = noised(path, source.x0, eps, t)
        with torch.no_grad():
            shared = options.solver == "none"
            x_r = path.noised(source.x0, eps, r) if shared else self.neighbour(x_t, t, r, source.cond)
            target = consistency_function(self.target.denoiser, x_r, r, source.cond)
        residual = consistency_function(self.student, x_t, t, source.cond) - target
        c = options.huber
        losses = residual.square().flatten(1).mean(1) if c is None else pseudo_huber(residual, c)
        weight = 1 / (upper - lower) if options.weight else 1.0
        return Loss((weight * losses).mean(), {"residual": rms(residual)})

    def after_step(self, turn: Turn) -> None:
        self.target.update()
