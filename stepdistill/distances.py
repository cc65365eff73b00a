"""Distances between clean latents, each a mean over samples: what regressions minimise."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

DistanceName = Literal["l2", "l1", "huber"]


def distance(a: Tensor, b: Tensor, name: DistanceName) -> Tensor:
    """The distance of a and b [B, ...], a scalar.

    Args:
        a, b: what is compared.
        name: ``l2``, mean squared difference; ``l1``, mean absolute difference; ``huber``, (sqrt(|r|^2 + c^2) - c) / d
            per sample of d elements with c = 0.00054 d (Lee et al. 2024, 2405.20320, eq. 8).
    """
    difference = a - b
    if name == "l2":
        return difference.square().mean()
    if name == "l1":
        return difference.abs().mean()
    size = difference[0].numel()
    c = 0.00054 * size
    return (((difference.flatten(1).square().sum(1) + c**2).sqrt() - c) / size).mean()
