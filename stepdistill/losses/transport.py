"""Entropic optimal transport between the tokens of two predictions: where each token of one should move.

Cuturi 2013, "Sinkhorn Distances", 1306.0895, in the log domain; the debiasing of Feydy et al. 2019, 1810.08278. Both
clouds have n tokens of mass 1 / n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tokens(x: Tensor) -> Tensor:
    """States [B, C, H, W] as clouds of tokens [B, H W, C]; of a video [B, C, F, H, W] each frame is a cloud of its own,
    [B F, H W, C]."""
    if x.ndim == 5:
        x = x.transpose(1, 2).flatten(0, 1)
    return x.flatten(2).transpose(1, 2)


def from_tokens(cloud: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`tokens`, for a state of the shape of ``like``."""
    height, width = like.shape[-2:]
    x: Tensor = cloud.transpose(1, 2).unflatten(2, (height, width))
    frames = (like.shape[0], -1)
    return x if like.ndim == 4 else x.unflatten(0, frames).transpose(1, 2)


def places(like: Tensor) -> Tensor:
    """Where the tokens of states [B, C, H, W] lie in the unit square, [H W, 2]."""
    rows, columns = (torch.arange(n, device=like.device) / max(n - 1, 1) for n in like.shape[-2:])
    return torch.cartesian_prod(rows, columns)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, [B, n, m], of clouds [B, n, C] and [B, m, C]."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def sinkhorn(cost: Tensor, entropy: Tensor, iterations: int) -> Tensor:
    """The transport plan T [B, n, m] that minimises <cost, T> + entropy <T, log T> for uniform masses.

    Args:
        cost: [B, n, m].
        entropy: [B, 1, 1], above 0, in the unit of the cost.
        iterations: of Sinkhorn's algorithm, after which the masses of the second cloud are exact.
    """
    n, m = cost.shape[1:]
    kernel = -cost / entropy
    f, g = cost.new_zeros(cost.shape[0], n, 1), cost.new_zeros(cost.shape[0], 1, m)
    for _ in range(iterations):
        f = -math.log(n) - torch.logsumexp(kernel + g, dim=2, keepdim=True)
        g = -math.log(m) - torch.logsumexp(kernel + f, dim=1, keepdim=True)
    return (kernel + f + g).exp()


def displacement(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """n sum_j T_ij (a_i - b_j), [B, n, C]: half the gradient of the transport's cost in a_i, for tokens of mass 1."""
    return a.shape[1] * (plan.sum(2, keepdim=True) * a - plan @ b)


def transported(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """n <T, |a_i - b_j|^2> of each cloud, [B]."""
    return a.shape[1] * (plan * squared_distances(a, b)).sum(dim=(1, 2))
