"""What continuous-time consistency methods share: TrigFlow read from any path, the tangent, its times and its loss.

At the angle a = atan2(sigma, alpha) of any path the state y = x_t / |(alpha, sigma)| is cos(a) x0 + sin(a) eps, and
what a network says of (x0, eps) is F = cos(a) eps - sin(a) x0, the velocity dy/da (Lu and Song 2024, 2410.11081); its
x0 is then f = cos(a) y - sin(a) F, and y itself at a = 0. Data deviation 1, as latents have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Prediction, TablePath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SAMPLER_GRID, SourceOptions, examples, noised
from stepdistill.losses.contract import Method, Trained
from stepdistill.networks.derivative import Derivative, Way
from stepdistill.networks.sampler import Sampler


def trig_velocity(said: Prediction) -> Tensor:
    """F = cos(a) eps - sin(a) x0 [B, ...] at the angle a of the prediction's time: dy/da in TrigFlow."""
    a = per_sample(said.path.angle(said.t), said.x0)
    return torch.cos(a) * said.eps - torch.sin(a) * said.x0


class Weight(nn.Module):
    """w(a) [B], linear in cosines of the angle a [B]; 0 at the start. At its best e^-w is the mean error at a."""

    def __init__(self, waves: int = 8) -> None:
        super().__init__()
        self.amplitudes = nn.Parameter(torch.zeros(waves))

    def forward(self, a: Tensor) -> Tensor:
        waves = torch.arange(len(self.amplitudes), device=a.device)
        return torch.cos(2 * a[:, None] * waves) @ self.amplitudes


class ContinuousOptions(SourceOptions):
    """Options of a continuous-time consistency method."""

    guidance: float = 4.5  # of the teacher's velocity: 4 to 5 in SANA-Sprint (2503.09641), 1 to 2 in sCM
    log_mean: float = -0.8  # of the lognormal level, for latents (sCM, ImageNet 512)
    log_deviation: float = 1.6  # its deviation in the logarithm
    noise_share: float = 0.0  # share of samples put at pure noise, where every drawing starts
    tangent_warmup: int = (
        10_000  # updates over which the derivative fades in (H); 0: it is whole from the start
    )
    offset: float = 0.1  # c of the normalisation
    adaptive: bool = True  # the learnt weight; rCM (2510.08431) does without
    derivative: Way | None = None  # null: difference on a table, and auto else
    # Greatest h of the differences, in units of [0, 1], and never more than a quarter of the time. Where drawings
    # start, smaller ones see the unevenness of a pretrained network from one timestep to the next, not its slope.
    derivative_step: float = 0.04


class ContinuousConsistency(Method):
    """A method that takes back what the consistency function changes by along the teacher's trajectory: all but whose
    turn it is, and what stands beside :meth:`consistency`."""

    default_times = (1.0, 0.75, 0.5, 0.25)
    options: ContinuousOptions

    def setup(self) -> None:
        way = self.options.derivative or (
            "difference" if isinstance(self.student.path, TablePath) else "auto"
        )
        self.derivative = Derivative(way, self.options.derivative_step)
        self.weight = Weight() if self.options.adaptive else None

    def trained(self) -> dict[str, Trained]:
        return {"student": Trained("student", self.weight)}

    def sampler(self) -> Sampler:
        return Sampler(self.times, True, SAMPLER_GRID)

    def drawn_times(self, draws: Draws) -> Tensor:
        """Times [B] in (0, 1] whose levels are lognormal, a share of them at pure noise."""
        options, path = self.options, self.student.path
        level = (options.log_mean + options.log_deviation * draws.normal("level", ())).exp()
        t = path.time_of(torch.atan(level))
        if isinstance(path, TablePath):
            t = (t * path.steps).ceil().clamp_min(2) / path.steps  # a difference takes the entry below
        return torch.where(draws.uniform("start") < options.noise_share, torch.ones_like(t), t)

    def step(self, t: Tensor) -> Tensor:
        """h [B] of the differences at t [B]: on a table whole entries."""
        h = (t / 4).clamp_max(self.options.derivative_step)
        path = self.student.path
        return (h * path.steps).round().clamp_min(1) / path.steps if isinstance(path, TablePath) else h

    def share(self, step: int) -> float:
        """r, how much of the derivative counts at the method's step, in [0, 1]."""
        warmup = self.options.tangent_warmup
        return min(1.0, step / warmup) if warmup else 1.0

    @torch.no_grad()
    def slope(self, now: Prediction, cond: Condition) -> Tensor:
        """dF/da [B, ...] of the student along the teacher's trajectory, at the state where the guided teacher says
        ``now``; never with a graph."""
        path, t = self.student.path, now.t

        def along(time: Tensor) -> Tensor:  # the trajectory near t is the arc of the teacher's DDIM step
            return trig_velocity(self.student.predict(now.at(time), time, cond))

        pace = self.step(t) / self.derivative.step  # by which a difference is taken over h of each sample
        rate = self.derivative(along, (t,), (pace,))
        speed = self.derivative(path.angle, (t,), (pace,))  # of a, in the way that the first call has settled
        return rate / per_sample(speed, rate)

    @torch.no_grad()
    def tangent(self, now: Prediction, F: Tensor, cond: Condition, share: float) -> Tensor:
        """g = cos(a) df/da = -cos^2(a) (F - v) - r cos(a) sin(a) (y + dF/da) [B, ...] with v the guided teacher's F, of
        its second part only a share (2410.11081, algorithm 1).

        Args:
            now: what the guided teacher says at the state.
            F: what the student says there, as a velocity [B, ...].
            cond: the conditions.
            share: r, in [0, 1].
        """
        a = per_sample(self.student.path.angle(now.t), F)
        g = -torch.cos(a).square() * (F - trig_velocity(now))
        if share == 0:
            return g
        return g - share * torch.cos(a) * torch.sin(a) * (self.state(now, a) + self.slope(now, cond))

    def state(self, now: Prediction, a: Tensor) -> Tensor:
        """y = cos(a) x0 + sin(a) eps [B, ...] where the teacher says ``now``, at the angles a [B, 1, ...]."""
        return torch.cos(a) * now.x0 + torch.sin(a) * now.eps

    def consistency(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """e^w |F - sg[F + g / (|g| + c)]|^2 - w, the mean over samples and elements, with the root mean square for
        |g|, so that c holds at any resolution; and what to log."""
        options, draws, path = self.options, batch.draws, self.student.path
        source = examples(batch, options.source)
        t = self.drawn_times(draws)
        x_t = noised(path, source.x0, draws.normal("eps", tuple(source.x0.shape[1:])), t)
        now = self.teacher.predict(x_t, t, source.cond, guidance=options.guidance)
        F = trig_velocity(self.student.predict(x_t, t, source.cond))
        g = self.tangent(now, F.detach(), source.cond, self.share(step))
        size = g.flatten(1).norm(dim=1) / math.sqrt(g[0].numel())  # [B]
        target = F.detach() + g / per_sample(size + options.offset, g)
        error = (F - target).square().flatten(1).mean(1)  # [B]
        w = self.weight(path.angle(t)) if self.weight is not None else torch.zeros_like(error)
        logs = {"tangent": size.square().mean().sqrt(), "error": error.detach().mean()}
        return (w.exp() * error - w).mean(), {**logs, **self.derivative.logs()}
