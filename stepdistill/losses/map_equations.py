"""The differential equations of a flow map, each solved for the mean velocity u that leads in it.

With X = x - (t - s) u(x, t, s), v the velocity that the map belongs to and D/Dt = d_t + grad_x . v:

- Eulerian, the start moves: u = v(x, t) - (t - s) Du/Dt.
- Lagrangian, the end moves: u = v(X, s) + (t - s) d_s u.

The derivatives are exact, or else differences. A difference of u over a wide h is wrong at the exact map itself, as u
bends in its times wherever a trajectory does, so differences are of what the exact map leaves equal: the end X, which
is constant along a trajectory, and a state that two ways reach. With y(m) the state at m of the trajectory through a
point, by steps of Heun along v (Karras et al. 2022, 2206.00364, alg. 1), two for the Eulerian equation:

- Eulerian: DX/Dt = v - u - (t - s) Du/Dt, so u is to be u + (X(x, t, s) - X(y(m), m, s)) / (t - m) at m = t - h.
- Lagrangian: u is to be u + (X(x, t, s) - y(s)) / (m - s), y from X(x, t, m) at m = s + h.

Either looks to the side from which its equation carries the map, to the data and to the start of the jump. At the
exact map it leaves Heun's error alone, of second order in h, and a jump shorter than h learns Heun's step itself. The
step halves the time at most: near data a trajectory bends on the scale of its own time.

``least`` is the least time at which v is read. Jumps that end below it are closed by x0, which on the straight path is
a step along v: X(x, t, s) is to be X - (least - s) v(X, least) of X = X(x, t, least).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.networks.derivative import Derivative
from stepdistill.networks.student import Student

SHORTEST = 1e-3
"""Below this length a jump's mean velocity is read off the trajectory's direction: a difference would be rounding."""

LEG_STEPS = 2
"""Heun's steps to the other end of an Eulerian difference, whose error counts over h: on a table an eps network is so
rough near pure noise that a second step takes away two thirds of it (0.069 to 0.022 of 1.36 on ``emoji``, h = 0.06)."""

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""v [B, ...] at x [B, ...] and t [B]."""


class MapEquations:
    """What u(x, t, s) is to be by each of the equations, [B, ...], without a graph.

    Args:
        student: u.
        velocity: v.
        derivative: how derivatives are taken; its step is h.
        least: the least time at which v is read.
    """

    def __init__(self, student: Student, velocity: Velocity, derivative: Derivative, least: float) -> None:
        self.student, self.velocity = student, velocity
        self.derivative, self.least = derivative, least

    @torch.no_grad()
    def along(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """v at x, and how u changes as x and t move along it, both [B, ...]; None where that is a difference."""
        v = self.velocity(x, t, cond)
        moves = (v, torch.ones_like(t), torch.zeros_like(s))
        return v, self.derivative.exact(self._u(cond), (x, t, s), moves)

    @torch.no_grad()
    def eulerian(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        cond: Condition,
        now: Tensor,
        share: float = 1.0,
        along: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """The Eulerian equation's u for s <= t, v itself where s = t.

        Args:
            x: states [B, ...].
            t, s: starts and ends of their jumps, [B].
            cond: their conditions.
            now: what u is.
            share: how much of the derivative counts.
            along: see :meth:`along`, where it was asked before u had a graph, which needs less memory.
        """
        v, rate = along or self.along(x, t, s, cond)
        if rate is not None:
            return v - share * per_sample(t - s, x) * rate
        m, y = self.leg(x, t, s, cond, v, self.derivative.step, LEG_STEPS)
        apart = self._end(x, t, s, cond, now) - self._end(y, m, s, cond)
        width = per_sample(t - m, x)
        whole = torch.where(width > SHORTEST, now + apart / width.clamp_min(SHORTEST), v)
        return v + share * (whole - v)

    @torch.no_grad()
    def lagrangian(
        self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor, share: float = 1.0
    ) -> Tensor:
        """The Lagrangian equation's u for s < t; jumps that end below ``least`` are closed. Arguments as before."""
        wanted, low = torch.empty_like(x), s < self.least
        if len(i := low.nonzero()[:, 0]):
            wanted[i] = self._closed(x[i], t[i], s[i], cond.rows(i))
        if len(i := (~low).nonzero()[:, 0]):
            wanted[i] = self._end_moves(x[i], t[i], s[i], cond.rows(i), now[i], share)
        return wanted

    def _end_moves(
        self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor, share: float
    ) -> Tensor:
        moves = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(s))
        rate = self.derivative.exact(self._u(cond), (x, t, s), moves)
        if rate is not None:
            gap = per_sample(t - s, x)
            return self.velocity(x - gap * now, s, cond) + share * gap * rate
        m = torch.minimum(s + s.clamp(2 * SHORTEST, self.derivative.step), t)
        there = self._end(x, t, m, cond)
        v = self.velocity(there, m, cond)
        end, width = self._end(x, t, s, cond, now), per_sample(m - s, x)
        apart = end - self._heun(there, m, s, cond, v)
        whole = torch.where(width > SHORTEST, now + apart / width.clamp_min(SHORTEST), v)
        if share == 1:
            return whole
        v = self.velocity(end, s, cond)
        return v + share * (whole - v)

    def _closed(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        m = t.clamp_max(self.least)
        there = self._end(x, t, m, cond)
        end = there - per_sample(m - s, x) * self.velocity(there, m, cond)
        return (x - end) / per_sample(t - s, x)

    @torch.no_grad()
    def teacher_leg(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, length: float) -> Tensor:
        """u for s < t of two jumps, the first by Heun's step over ``length`` and the second by the student (CTM, Kim et
        al. 2023, 2310.02279, "soft consistency")."""
        v = self.velocity(x, t, cond)
        m, y = self.leg(x, t, s, cond, v, length)
        mean = (x - self._end(y, m, s, cond)) / per_sample(t - s, x)
        return torch.where(per_sample(t - m, x) > SHORTEST, mean, v)

    def leg(
        self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, v: Tensor, length: float, steps: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The time m [B] that is ``length`` before t, no earlier than t / 2, s and ``least``, and the state there, by
        some steps of Heun."""
        m = torch.minimum(torch.maximum(t - (t / 2).clamp_max(length), s.clamp_min(self.least)), t)
        start, end = t, torch.lerp(t, m, 1 / steps)
        x = self._heun(x, start, end, cond, v)
        for k in range(1, steps):
            start, end = end, torch.lerp(t, m, (k + 1) / steps)
            x = self._heun(x, start, end, cond, self.velocity(x, start, cond))
        return m, x

    def _heun(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, v: Tensor) -> Tensor:
        """The state at s from x at t, where the velocity is v."""
        width = per_sample(t - s, x)
        return x - width * (v + self.velocity(x - width * v, s, cond)) / 2

    def _u(self, cond: Condition) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda x, t, s: self.student.flow_velocity(x, t, s, cond)

    def _end(self, x: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor | None = None) -> Tensor:
        """X(x, t, s) in float32, from u where that is known as exactly: in bfloat16 a difference would be rounding."""
        if now is None or torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                now = self.student.flow_velocity(x, t, s, cond)
        return x - per_sample(t - s, x) * now
