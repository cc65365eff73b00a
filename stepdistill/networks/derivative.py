"""The directional derivative of a network along its state and its times: exact, by finite differences, or checked.

Continuous-time objectives need d/dh f(x + h w, t + h a, s + h b) at h = 0, never a gradient through it. Three ways:

- ``exact``: forward-mode differentiation (``torch.func.jvp``). Torch's fused attention has no forward-mode rule, and
  that of GroupNorm takes contiguous inputs only; both are re-routed for the call: diffusers' networks run as they are.
- ``difference``: central differences in float32, one-sided where a time would leave [0, last] or the end of a jump
  would pass its start. In bfloat16 they are noise (rounding over h), so autocast is off here for both ways.
- ``auto``: exact where the network has the rules; the first call also takes differences and keeps, and says, how far
  apart the two are. Pretrained embeddings of 1000 t turn up to one radian per 1/1000 of time: over h = 5 / 1000 a
  difference smooths what the exact derivative sees, so a gap of several percent is the embedding's and no error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from stepdistill.attention.forward_mode import forward_mode
from stepdistill.diffusion.path import per_sample
from stepdistill.networks.compiled import uncompiled
from stepdistill.system.log import say

Way = Literal["auto", "exact", "difference"]
Function = Callable[..., Tensor]

STEP = 5e-3
"""Default h: where truncation h^2 and rounding 1e-7 / h meet in float32."""


def directional_derivative(
    fn: Function,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    way: Literal["exact", "difference"] = "exact",
    step: float = STEP,
    last: float = 1.0,
) -> Tensor:
    """The derivative of ``fn`` at ``primals`` along ``tangents``, shaped like fn's output and without a graph.

    Args:
        fn: takes the primals, returns one tensor [B, ...]; conditions are held in its closure.
        primals: states [B, C, H, W] and times [B]; where there are two times, the start before the end of a jump.
        tangents: shaped like the primals; tangents of times are in units of [0, 1].
        way: how.
        step: h of the differences.
        last: the last time at which fn says anything new; a table ends before pure noise.

    Raises:
        NotImplementedError, RuntimeError: for ``exact``, where an operation of the network has no forward-mode rule.
    """
    device = primals[0].device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if way == "difference":
            return _difference(fn, primals, tangents, step, last)
        with forward_mode(), uncompiled():
            rate: Tensor = torch.func.jvp(fn, tuple(primals), tuple(tangents))[1]
            return rate.detach()


def _difference(
    fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor], step: float, last: float
) -> Tensor:
    """(f(p + a w) - f(p - b w)) / (a + b) with a, b per sample: h each, or 0 where that side is closed."""
    times = [(p, w) for p, w in zip(primals, tangents, strict=True) if p.ndim == 1]
    ahead, behind = (_open(times, h, last) for h in (step, -step))
    if len(times) == 2:  # s = t at an end of time: the order gives way, the interval does not
        neither = ~(ahead | behind)
        ahead = ahead | (neither & _open(times, step, last, ordered=False))
        behind = behind | (neither & ~ahead)
    a, b = step * ahead.to(primals[0].dtype), step * behind.to(primals[0].dtype)
    up = fn(*(p + per_sample(a, p) * w for p, w in zip(primals, tangents, strict=True)))
    down = fn(*(p - per_sample(b, p) * w for p, w in zip(primals, tangents, strict=True)))
    return (up - down) / per_sample(a + b, up)


def _open(times: list[tuple[Tensor, Tensor]], h: float, last: float, ordered: bool = True) -> Tensor:
    """Which samples [B] may move by h: their times stay in [0, last], and no jump's end passes its start."""
    moved = [t + h * w for t, w in times]
    if not moved:  # a derivative along the state alone: nothing to leave
        return torch.ones((), dtype=torch.bool)
    inside = reduce(torch.logical_and, [(t >= 0) & (t <= last) for t in moved])
    return inside & (moved[0] >= moved[1]) if ordered and len(moved) == 2 else inside


class Derivative:
    """:func:`directional_derivative` in a way that is settled at the first call.

    Args:
        way: ``auto`` takes the exact one where it runs, compares it with differences once and says how far they are
            apart; without forward-mode rules it says so and takes differences.
        step: h of the differences.
        last: the last time at which the network says anything new.

    Attributes:
        gap: relative difference of the two at the first call, |exact - difference| over the larger of |exact| and
            |f|; None before it, or where only one was asked for or can be had.
    """

    def __init__(self, way: Way = "auto", step: float = STEP, last: float = 1.0) -> None:
        self.way, self.step, self.last = way, step, last
        self.gap: float | None = None

    def __call__(self, fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
        """The derivative, without a graph."""
        rate = self.exact(fn, primals, tangents)
        return self._difference(fn, primals, tangents) if rate is None else rate

    def exact(self, fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor | None:
        """The exact derivative; None where differences were asked for, or are all that can be had."""
        if self.way == "difference":
            return None
        try:
            rate = directional_derivative(fn, primals, tangents, "exact")
        except (NotImplementedError, RuntimeError) as error:
            if self.way == "exact":
                raise
            self.way = "difference"
            say(
                f"derivative: finite differences, as the exact one cannot be had ({str(error).splitlines()[0]})"
            )
            return None
        if self.way == "auto":
            near = self._difference(fn, primals, tangents)
            with torch.no_grad():
                scale = max(float(rate.norm()), float(fn(*primals).norm()), math.ulp(0.0))
            self.way, self.gap = "exact", float((rate - near).norm()) / scale
            say(
                f"derivative: exact; finite differences with h = {self.step:g} differ by {self.gap:.2g} of it"
            )
        return rate

    def _difference(self, fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
        return directional_derivative(fn, primals, tangents, "difference", self.step, self.last)

    def logs(self) -> dict[str, Tensor]:
        """What a method adds to its logs: the gap, where the two were compared."""
        return {} if self.gap is None else {"derivative_gap": torch.tensor(self.gap)}


def differentiates(holder: object) -> bool:
    """Whether an object has a derivative among its attributes."""
    return any(isinstance(x, Derivative) for x in vars(holder).values())


def takes_exact(holder: object) -> bool:
    """Whether an object has a derivative among its attributes that is exact, or will be where it can."""
    return any(isinstance(x, Derivative) and x.way != "difference" for x in vars(holder).values())
