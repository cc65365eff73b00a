"""Kernel distance: the unbiased estimate of MMD^2 with a cubic kernel (Binkowski et al. 2018, 1801.01401, sec. 4).

    k(x, y) = (gamma x.y + 1)^3,   MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  pairs of different samples only.

All pairs are used (the literature averages over random subsets of 1,000, which has the same mean and more noise); the
standard error is the jackknife's: see :mod:`stepdistill.metrics.mmd`.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.metrics.mmd import KernelDistance, mean_discrepancy


def kernel_distance(x: Tensor, y: Tensor, *, gamma: float | None = None, block: int = 1024) -> KernelDistance:
    """Unbiased cubic MMD^2 between features x [N, D] and y [M, D].

    Args:
        x: features [N, D], N >= 3.
        y: features [M, D], M >= 3.
        gamma: scale of the inner product; None is 1 / D, the literature's KID.
        block: rows of the kernel matrix held at a time.

    Raises:
        ValueError: a side has fewer than 3 features.
    """
    scale = 1 / x.shape[1] if gamma is None else gamma
    return mean_discrepancy(x, y, lambda a, b: (scale * a @ b.T + 1).pow(3), block=block)
