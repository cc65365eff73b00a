"""Noise levels sigma / alpha, as EDM counts them: grids, laws, and pairs of an upper and a lower level."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
