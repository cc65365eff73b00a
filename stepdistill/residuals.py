"""Losses of the residual r between a consistency function and its target."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def rms(residual: Tensor) -> Tensor:
    """The root mean square of a residual, for the log."""
    return residual.detach().square().mean().sqrt()
