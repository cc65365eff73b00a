"""What the consistency methods share: noised latents on a path, the boundary, jumps, and the target network."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from stepdistill.diffusion.path import Path, TablePath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Roles


def karras(low: float, high: float, intervals: int, rho: float) -> Tensor:
    """Karras' grid (Karras et al. 2022, 2206.00364, eq. 5), ascending: (low^(1/rho) + i/n (high^(1/rho) -
    low^(1/rho)))^rho for i = 0 .. n, float32 [n + 1]."""
    first, last = low ** (1 / rho), high ** (1 / rho)
    return torch.linspace(first, last, intervals + 1, dtype=torch.float64).pow(rho).float()


def lognormal_law(grid: Tensor, mean: float, deviation: float) -> Tensor:
    """The probability [n] that a lognormal level falls into each interval of an ascending grid [n + 1], given that
    it falls into the grid (Song and Dhariwal 2023, 2310.14189): differences of
    erf((ln level - mean) / (sqrt(2) deviation))."""
    weights = torch.erf((grid.log() - mean) / (math.sqrt(2) * deviation)).diff()
    return weights / weights.sum()


def ect_lower(t: Tensor, q: float, stage: int) -> Tensor:
    """The lower level r [B] of t [B] in a stage of ECT (Geng et al. 2024, 2406.14548): max(0, t (1 - n(t) / q^(stage +
    1))) with n(t) = 1 + 8 sigmoid(-t); 0 stands for clean data."""
    gap = (1 + 8 * torch.sigmoid(-t)) / q ** (stage + 1)
    return (t * (1 - gap)).clamp_min(0)


Source = Literal["pairs", "images"]
"""Where clean latents come from: cached samples of the teacher, or real images."""


class SourceOptions(PairOptions):
    """Options of a method that learns at noised clean latents."""

    group: ClassVar[str] = "consistency"

    source: Source = "pairs"  # where clean latents come from

    @property
    def needs(self) -> frozenset[str]:
        return super().needs - {"pairs"} | {self.source}


SAMPLER_GRID = 50
"""Times of LCMScheduler and TCDScheduler, out of which the steps of a student are taken."""


def examples(batch: Batch, source: Source) -> Examples:
    """The batch's clean latents and their conditions."""
    return cast(Examples, batch.pairs if source == "pairs" else batch.images)


def last_time(path: Path) -> float:
    """Where a consistency function is the identity: timestep 0 of a discrete table, as in LCMScheduler; clean data on
    any other path."""
    return 1 / path.steps if isinstance(path, TablePath) else 0.0


def noised(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] at t [B]; at t = 1 pure noise, as in sampling, also where the path keeps a trace of data."""
    return torch.where(per_sample(t == 1, eps), eps, path.noised(x0, eps, t))


def consistency_function(denoiser: Denoiser, z: Tensor, t: Tensor, cond: Condition) -> Tensor:
    """The consistency function f(z, t) [B, C, H, W], the identity at :func:`last_time` whatever the network says.

    On a discrete table c_skip z + c_out x0 with the scalings of LCMScheduler (Luo et al. 2023, 2310.04378), in
    timesteps n: c_skip = 0.25 / ((10 n)^2 + 0.25), c_out = 10 n / sqrt((10 n)^2 + 0.25). Elsewhere x0.
    """
    x0 = denoiser.predict(z, t, cond).x0
    if not isinstance(denoiser.path, TablePath):
        return torch.where(per_sample(t <= 0, z), z, x0)
    n = 10 * denoiser.family.time(denoiser.path, t)
    skip, out = 0.25 / (n.square() + 0.25), n / (n.square() + 0.25).sqrt()
    return per_sample(skip, z) * z + per_sample(out, z) * x0


def jump(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
    """alpha_s x0 + sigma_s eps with what the network says at (z, t), [B, C, H, W]; the identity at s = t."""
    return torch.where(per_sample(t <= s, z), z, denoiser.predict(z, t, cond).at(s))


class Target:
    """The network that a consistency target is read from: an average of the student, or the student as it is.

    Args:
        roles: whose student is followed; the average is a role of them, "target".
        decay: of the average, in [0, 1); 0 takes the student itself, without a second network.
    """

    def __init__(self, roles: Roles, decay: float) -> None:
        self.roles, self.decay = roles, decay
        self.average = roles.add("target", "student", trained=False) if decay else None

    @property
    def denoiser(self) -> Denoiser:
        """The network; whoever calls it switches gradients off."""
        return self.average or self.roles.student

    def update(self) -> None:
        """One step of the average, after a step of the student."""
        if self.average is not None:
            self.roles.average("target", "student", self.decay)
