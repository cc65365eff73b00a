"""Distances between clean latents, each a mean over samples: what regressions minimise."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample

DistanceName = Literal["l2", "l1", "huber"]


def distance(a: Tensor, b: Tensor, name: DistanceName, weight: Tensor | None = None) -> Tensor:
    """The distance of a and b [B, ...], a scalar.

    Args:
        a, b: what is compared.
        name: ``l2``, mean squared difference; ``l1``, mean absolute difference; ``huber``, (sqrt(|r|^2 + c^2) - c) / d
            per sample of d elements with c = 0.00054 d (Lee et al. 2024, 2405.20320, eq. 8).
        weight: of the samples, [B]; None weighs all with 1.
    """
    each = a - b
    if name == "l2":
        each = each.square()
    elif name == "l1":
        each = each.abs()
    else:
        size = each[0].numel()
        c = 0.00054 * size
        each = ((each.flatten(1).square().sum(1) + c**2).sqrt() - c) / size  # [B]
    return (each if weight is None else each * per_sample(weight, each)).mean()


def pseudo_huber(residual: Tensor, c: float) -> Tensor:
    """sqrt(|r|^2 + c^2) - c per sample, [B], with one norm over all d elements of r [B, ...] and c in units of sqrt(d)
    (Song and Dhariwal 2023, 2310.14189, c = 0.00054); at c = 0 the norm itself."""
    flat = residual.flatten(1)
    scaled = c * math.sqrt(flat.shape[1])
    # One norm over r and c together has the gradient 0 at r = 0, also where c = 0.
    joined = torch.cat([flat, flat.new_full((len(flat), 1), scaled)], 1)
    norm: Tensor = torch.linalg.vector_norm(joined, dim=1)
    return norm - scaled


def elementwise_huber(residual: Tensor, c: float) -> Tensor:
    """sqrt(r^2 + c^2) - c, mean over all elements: the loss of LCM's code, another one than :func:`pseudo_huber`."""
    return ((residual.square() + c**2).sqrt() - c).mean()


def robust(residual: Tensor, c: float = 1e-3) -> Tensor:
    """r^2 / sg sqrt(r^2 + c^2) per sample, [B], r^2 a mean over its elements: its gradient is that of sqrt(r^2 + c^2),
    twice (Barron 2019, 1701.03077, at alpha = 1)."""
    size = residual.flatten(1).square().mean(1)
    return size / (size.detach() + c**2).sqrt()


def rms(residual: Tensor) -> Tensor:
    """The root mean square of a residual, for the log."""
    return residual.detach().square().mean().sqrt()


def mean_size(field: Tensor) -> Tensor:
    """The mean absolute value of a field, for the log."""
    return field.detach().abs().mean()
