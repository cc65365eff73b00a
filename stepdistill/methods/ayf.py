"""AYF, Align Your Flow: a flow map by either continuous-time equation, with tangents of bounded length.

"Align Your Flow: Scaling Continuous-Time Flow Map Distillation", 2025, 2506.14603. With f = x_t - (t - s) u(x_t, t, s)
and v the teacher's guided velocity:

- EMD, ``objective: eulerian``: the gradient is that of f . sg[df/dt] with df/dt = (v - u) - r (t - s) Du/Dt. At s = t
  it is flow matching, at s = 0 continuous-time consistency. r rises from 0 to ``largest_share`` = 0.99 over
  ``tangent_warmup`` updates; r < 1 is a further term |u - v|^2, which keeps trajectories straight.
- LMD, ``objective: lagrangian``: that of f . sg[v(f, s) - df/ds], which is worse in the paper.
- Tangent normalisation: g = df/dt / (|df/dt| + c), |.| over a sample; the loss is |u - sg(u + g)|^2, so that u moves
  along g. Its value says nothing: ``residual`` is the length before the division.
- Both times are sigmoids of N(-0.8, 1).

Start values of ours, where the paper was read second-hand: c = 0.1, the law of times, and the gradient on u in the
place of f, which weighs a jump by 1 / (t - s). The paper guides by a weaker version of the teacher (autoguidance,
Karras et al. 2024, 2406.02507), v = l v_strong + (1 - l) v_weak: ``teachers.weak`` is one, smaller or less trained, and
l is ``autoguidance``, fixed at 2, the mean of what was recalled as U(1, 3); give ``guidance: 1`` beside it. Without it
the weak one is the teacher without its prompt, which is classifier-free guidance. Pairs have ``guidance`` alone, so a
warm start on them is not that of the guided map. Added: ``warm_start`` on pairs, jumps from where drawings start. Left
out: aligning the embeddings of time, as the student's is the teacher's; the adversarial stage: ``terms.gan_weight``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from stepdistill.diffusion.guidance import extrapolate
from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.flow_maps import (
    FlowMapMethod,
    MapOptions,
    PointOptions,
    logit_normal,
    teacher_velocity,
)


class AYF(FlowMapMethod):
    """See the module's text."""

    class Options(PointOptions, MapOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        autoguidance: float = (
            2.0  # lambda, by which teachers.weak guides the teacher, where there is one; 1 is none
        )
        objective: Literal["eulerian", "lagrangian"] = "eulerian"  # the equation that u is to fulfil
        tangent_warmup: Annotated[int, Field(ge=0)] = 10000  # updates over which r rises
        largest_share: Annotated[float, Field(ge=0, le=1)] = 0.99  # r after them
        tangent_offset: PositiveFloat = 0.1  # c of the tangents' length
        time_mean: float = -0.8  # of the logit of both times
        time_deviation: float = 1.0  # of the same

    weak_teacher = True
    options: Options

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        strong, guide = super().velocity(x, t, cond), self.roles.route.weak
        if guide is None:
            return strong
        weak = teacher_velocity(guide, x, t, cond, self.options.guidance)
        return extrapolate(weak, strong, self.options.autoguidance)

    def share(self, step: int) -> float:
        fade, after = self.options.tangent_warmup, step - self.options.warm_start
        return self.options.largest_share * (min(1.0, after / fade) if fade else 1.0)

    @torch.no_grad()
    def tangent(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor, r: float) -> Tensor:
        """Where u, which is ``now``, is to move, [B, ...], before the division."""
        if self.options.objective == "eulerian":
            return self.equations.eulerian(x, t, s, cond, now, r) - now
        wanted = torch.empty_like(now)
        if len(i := (s == t).nonzero()[:, 0]):
            wanted[i] = self.velocity(x[i], t[i], cond.rows(i))
        if len(i := (s != t).nonzero()[:, 0]):
            wanted[i] = self.equations.lagrangian(x[i], t[i], s[i], cond.rows(i), now[i], r)
        return wanted - now

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        a, b = (logit_normal(draws, name, options.time_mean, options.time_deviation) for name in ("a", "b"))
        x, _, t, s, cond = self.points(batch, a, b)
        if options.objective == "lagrangian":
            s = self.read_ends(draws, t, s)
        now = self.student.flow_velocity(x, t, s, cond)
        tangent = self.tangent(x, t, s, cond, now, self.share(turn.step))
        length = tangent.flatten(1).norm(dim=1)
        g = tangent / per_sample(length + options.tangent_offset, x)
        error = now - (now + g).detach()
        logs = {"residual": rms(tangent), **self.derivative.logs()}
        return Loss(error.flatten(1).square().sum(1).mean(), logs)
