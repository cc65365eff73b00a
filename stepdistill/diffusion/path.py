"""Noise schedules as paths x_t = alpha(t) x0 + sigma(t) eps, and what a network says about a point on one.

Time is t in [0, 1]: t = 0 is data, t = 1 is noise, a float32 tensor of shape [B]. Every output kind a diffusers
network can have is linear, ``out = a x0 + b eps``; with x_t that is a 2x2 system for (x0, eps), so one solve reads
them all: det = alpha b - sigma a, x0 = (b x_t - sigma out) / det, eps = (alpha out - a x_t) / det.

Two paths describe the same process where their signal-to-noise ratio is the same. The angle
atan2(sigma, alpha) in [0, pi/2] measures it without overflow at either end, and every path can be asked for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.remembered import remembered
from stepdistill.diffusion.shift import Times, shifted
from stepdistill.system.memory import sent

Output = Literal["x0", "eps", "v", "velocity"]
"""What a network returns: x0, eps, v = alpha eps - sigma x0 (Salimans and Ho 2022, 2202.00512), or dx_t/dt."""


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Shape [B] -> [B, 1, ..., 1], to multiply a tensor of shape [B, ...]."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def within(value: Tensor, low: float, high: float) -> Tensor:
    """``value`` clamped to [low, high]; unlike torch's clamp it keeps its forward-mode derivative at the very ends."""
    value = torch.where(value < low, low, value)
    return torch.where(value > high, high, value)


class Path(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps for t in [0, 1], with alpha(0) = 1 and sigma(0) = 0."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), each [B]."""

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt, each [B]."""

    @abstractmethod
    def time_of(self, angle: Tensor) -> Tensor:
        """The t in [0, 1] at which atan2(sigma, alpha) is ``angle``; angles past the end of the path give t = 1."""

    def shifted(self, u: Times) -> Times:
        """The times that an even spacing u in [0, 1] becomes on this path: u itself, but for a flow path's shift."""
        return u

    def unshifted(self, t: Times) -> Times:
        """The u whose time is t."""
        return t

    def same_schedule(self, other: Path) -> bool:
        """Whether both paths have the same noise at the same times."""
        times = torch.linspace(0.05, 1, 20)
        return torch.allclose(self.angle(times), other.angle(times), atol=1e-5)

    def angle(self, t: Tensor) -> Tensor:
        """atan2(sigma(t), alpha(t)) in [0, pi/2], shape [B]."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.atan2(sigma, alpha)

    def log_snr_half(self, t: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), the variable of DPM-Solver; +inf at t = 0."""
        alpha, sigma = self.alpha_sigma(t)
        return torch.log(alpha) - torch.log(sigma)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, shaped like x0 [B, ...]."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps

    def kernel(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and c of x_t = a x_s + c eps, each [B], for s <= t [B]: the exact kernel N(a x_s, c^2)."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        ratio = alpha_t / alpha_s
        return ratio, (sigma_t.square() - (ratio * sigma_s).square()).clamp_min(0).sqrt()

    def renoise(self, x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """From x_s to the noisier x_t (s <= t) through the exact kernel."""
        ratio, spread = self.kernel(s, t)
        return per_sample(ratio, x_s) * x_s + per_sample(spread, x_s) * eps

    def coefficients(self, kind: Output, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of ``out = a x0 + b eps`` for an output kind, each [B]."""
        alpha, sigma = self.alpha_sigma(t)
        if kind == "x0":
            return torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind == "eps":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if kind == "v":
            return -sigma, alpha
        return self.rates(t)

    def x0_gain(self, kind: Output, t: Tensor) -> Tensor:
        """How far the clean sample moves with an output of the kind, |d x0 / d output|, [B]: 14.6 for an eps output at
        the noisy end of Stable Diffusion's table, and at most 1 for v, x0 and a straight path's velocity."""
        if kind == "x0":
            return torch.ones_like(t)
        alpha, sigma = self.alpha_sigma(t)
        a, b = self.coefficients(kind, t)
        return (sigma / (alpha * b - sigma * a)).abs()

    @remembered
    def _solved(self, kind: Output, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """b / det and sigma / det of x0, a / det and alpha / det of eps, each [B]."""
        alpha, sigma = self.alpha_sigma(t)
        a, b = self.coefficients(kind, t)
        of_x0, of_eps = (torch.stack([b, sigma, a, alpha]) / (alpha * b - sigma * a)).chunk(2)
        return (of_x0[0], of_x0[1]), (of_eps[0], of_eps[1])

    def read(self, output: Tensor, kind: Output, x_t: Tensor, t: Tensor) -> Prediction:
        """The (x0, eps) that ``output`` implies at x_t. Where det vanishes (an eps output at pure noise) the output
        carries no information and the result is not finite: choose times below that end.

        Args:
            output: raw network output [B, ...].
            kind: what the output is.
            x_t: the network's noisy input [B, ...].
            t: times [B].
        """
        (x_in_x0, out_in_x0), (x_in_eps, out_in_eps) = self._solved(kind, t)
        # The half that the output states outright is taken as it stands, also where det vanishes.
        x0 = eps = output
        if kind != "x0":
            x0 = per_sample(x_in_x0, x_t) * x_t - per_sample(out_in_x0, x_t) * output
        if kind != "eps":
            eps = per_sample(out_in_eps, x_t) * output - per_sample(x_in_eps, x_t) * x_t
        return Prediction(self, x0, eps, t)

    def through(self, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Prediction:
        """The (x0, eps) whose DDIM step leads from x_t to x_s [B, ...]: what one call must say to go there.

        Args:
            x_t: where the step begins, at t [B].
            x_s: where it ends, at s < t [B].
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t), self.alpha_sigma(s)
        of_t, of_s = (
            torch.stack([sigma_s, -alpha_s, sigma_t, -alpha_t])
            .div(alpha_t * sigma_s - sigma_t * alpha_s)
            .chunk(2)
        )
        x0 = per_sample(of_t[0], x_t) * x_t - per_sample(of_s[0], x_t) * x_s
        eps = per_sample(of_t[1], x_t) * x_t - per_sample(of_s[1], x_t) * x_s
        return Prediction(self, x0, eps, t)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: Output) -> Tensor:
        """What a network of the given kind should return for (x0, eps), each [B, ...]: the inverse of :meth:`read`."""
        a, b = self.coefficients(kind, t)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps


@dataclass(frozen=True)
class Prediction:
    """What a network says about x_t: the clean sample and the noise it sees in it.

    Attributes:
        path: the path x_t lies on.
        x0: predicted clean sample [B, ...].
        eps: predicted noise [B, ...].
        t: times [B].
    """

    path: Path
    x0: Tensor
    eps: Tensor
    t: Tensor

    @property
    def velocity(self) -> Tensor:
        """dx_t/dt of the probability-flow ODE: alpha' x0 + sigma' eps."""
        alpha_rate, sigma_rate = self.path.rates(self.t)
        return per_sample(alpha_rate, self.x0) * self.x0 + per_sample(sigma_rate, self.x0) * self.eps

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma."""
        _, sigma = self.path.alpha_sigma(self.t)
        return -self.eps / per_sample(sigma, self.eps)

    def at(self, s: Tensor) -> Tensor:
        """The DDIM step to time s: alpha_s x0 + sigma_s eps (Song et al. 2020, 2010.02502, eq. 12 without noise)."""
        return self.path.noised(self.x0, self.eps, s)


@dataclass(frozen=True)
class FlowPath(Path):
    """The straight path alpha = 1 - t, sigma = t (Liu et al. 2022, 2209.03003; Lipman et al. 2022, 2210.02747).

    Attributes:
        shift: the time shift s of the teacher's schedule. It moves no point of the path, so paths are equal without it.
        clock_shift: the shift that makes t of the time that the network is told, where this counts t before a shift
            (CogView4); 1 for all others. It moves no point either.
    """

    shift: float = field(default=1.0, compare=False)
    clock_shift: float = field(default=1.0, compare=False)

    def shifted(self, u: Times) -> Times:
        return shifted(u, self.shift)

    def unshifted(self, t: Times) -> Times:
        return shifted(t, 1 / self.shift)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of(self, angle: Tensor) -> Tensor:
        sine, cosine = torch.sin(angle), torch.cos(angle)
        return (sine / (sine + cosine)).clamp(0, 1)


@dataclass(frozen=True)
class TrigPath(Path):
    """TrigFlow with unit data deviation: alpha = cos, sigma = sin of pi t / 2 (Lu and Song 2024, 2410.11081)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = t * (math.pi / 2)
        return torch.cos(angle), torch.sin(angle)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return -sigma * (math.pi / 2), alpha * (math.pi / 2)

    def time_of(self, angle: Tensor) -> Tensor:
        return (angle / (math.pi / 2)).clamp(0, 1)


@dataclass(frozen=True)
class EDMPath(Path):
    """alpha = 1, sigma = tan(t atan(sigma_max)) in [0, sigma_max] (noise levels of Karras et al. 2022, 2206.00364)."""

    sigma_max: float = 80.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.tan(t * math.atan(self.sigma_max))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        last = math.atan(self.sigma_max)
        return torch.zeros_like(t), last / torch.cos(t * last).square()

    def time_of(self, angle: Tensor) -> Tensor:
        return (angle / math.atan(self.sigma_max)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class TablePath(Path):
    """A variance-preserving path through a table of cumulative alphas, as diffusers' discrete schedulers have it.

    Timestep n of the table sits at t = (n + 1) / N, so t = 0 is clean data and t = 1 is the table's last entry. Between
    entries the angle is linear in t.

    Attributes:
        angles: atan2(sigma, alpha) at t = 0, 1/N, ..., 1: shape [N + 1], float64, ascending from 0.
    """

    angles: Tensor
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_alphas_cumprod(alphas_cumprod: Tensor) -> TablePath:
        """From diffusers' ``scheduler.alphas_cumprod`` [N], descending in (0, 1)."""
        table = alphas_cumprod.double().cpu()
        angles = torch.atan2((1 - table).clamp_min(0).sqrt(), table.sqrt())
        return TablePath(torch.cat([torch.zeros(1, dtype=torch.float64), angles]))

    @cached_property
    def _end(self) -> float:
        """The last angle."""
        return float(self.angles[-1])

    @property
    def steps(self) -> int:
        """N, the number of training timesteps."""
        return len(self.angles) - 1

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The angles on a device, and those at both ends of every segment [N, 2], copied there once."""
        if device not in self._tables:
            ends = torch.stack([self.angles[:-1], self.angles[1:]], 1)
            self._tables[device] = sent(self.angles, device), sent(ends, device)
        return self._tables[device]

    @remembered
    def _position(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t in units of the table's steps, and what it lacks to the nearest entry, a constant; each [B] in float64."""
        position = t.double() * self.steps
        return position, (position.round() - position).detach()

    def position(self, t: Tensor, near: float) -> Tensor:
        """t in units of the table's steps, float64 [B]: 0 is clean data, and n + 1 timestep n.

        Args:
            t: times [B]. They are float32: without a rounding 0.75 N would be a hair off its own entry.
            near: so close to an entry they are taken for it; the derivative in t is what it is beside it.
        """
        position, lacking = self._position(t)
        return position + lacking * (lacking.abs() < near)

    @remembered
    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The angles at both ends of t's segment and the fraction inside it, each [B] in float64."""
        position = within(self.position(t, 1e-4 * self.steps / 1000), 0, self.steps)
        lower = position.floor().clamp(max=self.steps - 1)
        low, high = self._table(t.device)[1][lower.long()].unbind(-1)
        return low, high, position - lower

    @remembered
    def _angle64(self, t: Tensor) -> Tensor:
        return torch.lerp(*self._segment(t))

    def angle(self, t: Tensor) -> Tensor:
        return self._angle64(t).to(t.dtype)

    @remembered
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self._angle64(t)
        return torch.cos(angle).to(t.dtype), torch.sin(angle).to(t.dtype)

    @remembered
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high, _ = self._segment(t)
        slope, angle = (high - low) * self.steps, self._angle64(t)
        return (-torch.sin(angle) * slope).to(t.dtype), (torch.cos(angle) * slope).to(t.dtype)

    def time_of(self, angle: Tensor) -> Tensor:
        table, ends = self._table(angle.device)
        wanted = angle.double().clamp(0, self._end)
        lower = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, self.steps - 1)
        low, high = ends[lower].unbind(-1)
        fraction = (wanted - low) / (high - low)
        return ((lower + fraction) / self.steps).to(angle.dtype)
