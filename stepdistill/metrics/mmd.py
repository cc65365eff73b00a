"""Maximum mean discrepancy of two sets of features under any kernel (Gretton et al. 2012, JMLR 13, sec. 2.2).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

The whole statistic is computed, in blocks of rows so that memory is bounded; nothing is subsampled, so the value has no
randomness of its own. Its standard error is the delete-one jackknife over the drawn set x, which has a closed form in
the row sums: how far other seeds would move it. The real set y stays what it is. Where both sets have one distribution
the jackknife errs on the large side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.metrics.blocks import rows_at_once
from stepdistill.metrics.float64 import wide

Kernel = Callable[[Tensor, Tensor], Tensor]
"""k of rows [N, D] and [M, D], shape [N, M]."""


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of MMD^2 (it can be negative where it is unbiased) and its standard error over other seeds."""

    value: float
    standard_error: float


def mean_discrepancy(
    x: Tensor, y: Tensor, kernel: Kernel, *, with_itself: bool = False, block: int = 1024
) -> KernelDistance:
    """MMD^2 between x [N, D] and y [M, D] of one device, there and in float64.

    Args:
        x: features [N, D], N >= 3, of drawn images.
        y: features [M, D], M >= 3, of real images; the standard error takes them as given.
        kernel: k.
        with_itself: False counts pairs of different samples only, and the estimate is unbiased; True counts every
            sample with itself, too: at least 0, and too large by about the mean of k(x, x) - k(x, x'), over N and M.
        block: rows of the kernel matrix held at a time, fewer where they are long.

    Raises:
        ValueError: a side has fewer than 3 features.
    """
    n, m = len(x), len(y)
    if min(n, m) < 3:
        raise ValueError(
            f"the kernel distance needs at least 3 features on both sides, there are {n} and {m}"
        )
    x, y = wide(x), wide(y)
    own_x, own_y = _own(x, kernel, block), _own(y, kernel, block)
    xx = _row_sums(x, x, kernel, block) - own_x  # [N], the diagonal left out
    yy = _row_sums(y, y, kernel, block) - own_y  # [M]
    xy = _row_sums(x, y, kernel, block)  # [N]
    within_x, within_y, across = xx.sum(), yy.sum(), xy.sum()
    if with_itself:
        value = (within_x + own_x.sum()) / n**2 + (within_y + own_y.sum()) / m**2 - 2 * across / (n * m)
    else:
        value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # The unbiased estimate without x_i, for every i, but for what all have in common.
    without_x = (within_x - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (across - xy) / ((n - 1) * m)
    return KernelDistance(float(value), float(((n - 1) * without_x.var(correction=0)).sqrt()))


def _row_sums(x: Tensor, y: Tensor, kernel: Kernel, block: int) -> Tensor:
    """sum_j k(x_i, y_j) for every i, shape [N]."""
    sums, block = x.new_empty(len(x)), rows_at_once(len(y), block)
    # Into one tensor: small ones in between would split the freed memory.
    for start in range(0, len(x), block):
        sums[start : start + block] = kernel(x[start : start + block], y).sum(1)
    return sums


def _own(x: Tensor, kernel: Kernel, block: int) -> Tensor:
    """k(x_i, x_i) for every i, shape [N]."""
    small = min(block, 64)
    return torch.cat([kernel(rows, rows).diagonal() for rows in torch.split(x, small)])
