"""Flow map matching: a map between any two times, by one of the three equations that characterise it.

Boffi, Albergo and Vanden-Eijnden 2024, "Flow map matching", 2406.07507, and 2025, "How to build a consistency model:
Learning flow maps via self-distillation", 2505.18825. In the mean velocity u, with X = x - (t - s) u(x, t, s):

- lagrangian, the end moves: u - (t - s) d_s u = v(X, s) (LMD; the prediction loss of FreeFlow is its case t = 1).
- eulerian, the start moves: u + (t - s) Du/Dt = v(x, t), Du/Dt = d_t u + grad_x u . v (EMD; MeanFlow's identity).
- semigroup, two jumps are one: u(x, t, s) = (1 - g) u(x, t, m) + g u(X(x, t, m), m, s) at m = g t + (1 - g) s (PSD; at
  g = 1/2 the loss of shortcut models, Frans et al. 2024, 2410.12557).

Each is a regression of u on its equation solved for the leading u, everything else without a gradient. v is the
teacher's velocity, or with ``velocity: self`` the student's own u(x, t, t) (LSD, ESD). On the share ``same`` of the
samples s = t, where u is the velocity itself: the teacher's, or with ``diagonal: data`` the conditional one, eps - x0.
That share (0.75 in 2505.18825, without a teacher) is the semigroup's only tie to v: the identity satisfies the rest.
``velocity: self`` with ``diagonal: data`` never calls the teacher. Derivatives fade in over ``tangent_warmup`` updates;
as differences they are taken along the teacher's trajectory (stepdistill/losses/map_equations.py). With ``first_leg``
the teacher makes the first of the semigroup's jumps, which ties every sample to v (CTM, Kim et al. 2023, 2310.02279).

Left out: gradients through derivatives and through v; the learnt log-variance, in whose place stands MeanFlow's weight
|e|^2 / sg(|e|^2 + c)^p; progressive matching (PFMM), which needs stages.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.flow_maps import FlowMapMethod, JumpOptions, adaptive, teacher_velocity


class FlowMap(FlowMapMethod):
    """See the module's text."""

    class Options(JumpOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        objective: Literal["lagrangian", "eulerian", "semigroup"] = (
            "lagrangian"  # the equation that u is to fulfil
        )
        velocity: Literal["teacher", "self"] = "teacher"  # off the diagonal; not asked for by the semigroup
        diagonal: Literal["teacher", "data"] = "teacher"  # what u(x, t, t) is to be
        middle: Literal["half", "uniform"] = "half"  # g of the semigroup: 1/2 (PSD-M), or U(0, 1) (PSD-U)
        # Length of the semigroup's first jump as one Heun step of the teacher, CTM's; 0: both jumps are the student's.
        first_leg: float = 0.0

    options: Options

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v(x, t) off the diagonal, [B, ...]."""
        if self.options.velocity == "self":
            return self.student.flow_velocity(x, t, t, cond)
        return super().velocity(x, t, cond)

    def diagonal(self, x: Tensor, x0: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """What u(x, t, t) is to be, [B, ...]."""
        if self.options.diagonal == "data":
            return (x - x0) / per_sample(t, x)
        return teacher_velocity(self.teacher, x, t, cond, self.options.guidance)

    @torch.no_grad()
    def target(
        self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor, g: Tensor, share: float = 1.0
    ) -> Tensor:
        """What u(x, t, s) is to be for s < t, [B, ...].

        Args:
            x: states [B, ...].
            t, s: starts and ends of their jumps, [B].
            cond: their conditions.
            now: what u is.
            g: where the semigroup parts the jumps, in (0, 1), [B].
            share: how much of a derivative counts.
        """
        if self.options.objective == "lagrangian":
            return self.equations.lagrangian(x, t, s, cond, now, share)
        if self.options.objective == "eulerian":
            return self.equations.eulerian(x, t, s, cond, now, share)
        if self.options.first_leg:
            return self.equations.teacher_leg(x, t, s, cond, self.options.first_leg)
        m = g * t + (1 - g) * s
        first = self.student.flow_velocity(x, t, m, cond)
        second = self.student.flow_velocity(x - per_sample(t - m, x) * first, m, s, cond)
        return first + per_sample(g, x) * (second - first)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        a, b = (draws.uniform(name, self.least, 1.0) for name in ("a", "b"))  # uniform on s < t
        x, x0, t, s, cond = self.points(batch, a, b)
        if options.objective == "lagrangian":
            s = self.read_ends(draws, t, s)
        g = draws.uniform("middle") if options.middle == "uniform" else torch.full_like(t, 0.5)
        now = self.student.flow_velocity(x, t, s, cond)
        target = torch.empty_like(now)
        if len(i := (s == t).nonzero()[:, 0]):
            target[i] = self.diagonal(x[i], x0[i], t[i], cond.rows(i))
        if len(i := (s != t).nonzero()[:, 0]):
            share = self.share(turn.step)
            target[i] = self.target(x[i], t[i], s[i], cond.rows(i), now[i], g[i], share)
        error = now - target
        logs = {"residual": rms(error), **self.derivative.logs()}
        return Loss(adaptive(error, options.power, options.offset), logs)
