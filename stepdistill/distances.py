"""Distances between clean latents, each a mean over samples: what regressions minimise."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepdistill.path import per_sample

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
