"""Kernel distance: the unbiased estimate of MMD^2 with a cubic kernel (Binkowski et al. 2018, 1801.01401, sec. 4).

    k(x, y) = (gamma x.y + 1)^3,   MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  pairs of different samples only.

The whole U-statistic is computed, in blocks of rows so that memory is bounded; nothing is subsampled, so the value
has no randomness of its own. Its standard error is the delete-one jackknife over both sets, which has a closed form
in the row sums. Where both sets have one distribution the jackknife errs on the large side, never below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of MMD^2 (it can be negative: it is unbiased) and its standard error."""

    value: float
    standard_error: float


def kernel_distance(x: Tensor, y: Tensor, *, gamma: float | None = None, block: int = 1024) -> KernelDistance:
    """Unbiased cubic MMD^2 between features x [N, D] and y [M, D].

    Args:
        x: features [N, D], N >= 3.
        y: features [M, D], M >= 3.
        gamma: scale of the inner product; None is 1 / D, the literature's KID.
        block: rows of the kernel matrix held at a time.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError(
            f"the kernel distance needs at least 3 features on both sides, there are {n} and {m}"
        )
    x, y = x.detach().double().cpu(), y.detach().double().cpu()
    scale = 1 / x.shape[1] if gamma is None else gamma
    xx = _row_sums(x, x, scale, block) - (scale * x.square().sum(1) + 1).pow(3)  # [N], the diagonal left out
    yy = _row_sums(y, y, scale, block) - (scale * y.square().sum(1) + 1).pow(3)  # [M]
    xy, yx = _row_sums(x, y, scale, block), _row_sums(y, x, scale, block)  # [N], [M]
    within_x, within_y, across = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # The estimate without x_i, for every i; and without y_j, for every j.
    without_x = (within_x - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (across - xy) / ((n - 1) * m)
    without_y = (within_y - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (across - yx) / ((m - 1) * n)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return KernelDistance(float(value), float(variance.sqrt()))


def _row_sums(x: Tensor, y: Tensor, scale: float, block: int) -> Tensor:
    """sum_j k(x_i, y_j) for every i, shape [N]."""
    return torch.cat([(scale * rows @ y.T + 1).pow(3).sum(1) for rows in torch.split(x, block)])
