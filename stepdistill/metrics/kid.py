"""Kernel distance: the unbiased estimate of MMD^2 with a cubic kernel (Binkowski et al. 2018, 1801.01401, sec. 4).

    k(x, y) = (gamma x.y + 1)^3,   MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),  pairs of different samples only.

All pairs are used (the literature averages over random subsets of 1,000, which has the same mean and more noise); the
standard error is the jackknife's: see :mod:`stepdistill.metrics.mmd`.
"""

from __future__ import annotations

from torch import Tensor

from stepdistill.metrics.float64 import wide
from stepdistill.metrics.mmd import KernelDistance, mean_discrepancy


def kernel_distance(x: Tensor, y: Tensor, *, gamma: float | None = None, block: int = 1024) -> KernelDistance:
    """Unbiased cubic MMD^2 between features x [N, D] and y [M, D].

    Args:
        x: features [N, D], N >= 3, of drawn images: the standard error is over them.
        y: features [M, D], M >= 3, of real images.
        gamma: scale of the inner product; None is 1 / D, the literature's KID.
        block: rows of the kernel matrix held at a time.

    Raises:
        ValueError: a side has fewer than 3 features.
    """
    scale = 1 / x.shape[1] if gamma is None else gamma
    return mean_discrepancy(x, y, lambda a, b: (scale * a @ b.T + 1).pow(3), block=block)


def paired_kernel_distance(x: Tensor, y: Tensor, *, gamma: float | None = None) -> KernelDistance:
    """The same between features of pairs, which may depend on each other: pictures of one prompt and noise.

    The mean over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) (Gretton et al. 2012, JMLR 13, lemma
    6): unbiased whatever x_i and y_i have in common, and 0 where all are equal. The standard error is the delete-one
    jackknife over pairs. It holds [N, N] numbers.

    Args:
        x, y: features [N, D], N >= 3.
        gamma: see :func:`kernel_distance`.

    Raises:
        ValueError: fewer than 3 pairs, or of two numbers.
    """
    count = len(x)
    if count < 3 or len(y) != count:
        raise ValueError(f"the paired kernel distance needs at least 3 pairs, there are {count} and {len(y)}")
    x, y = wide(x), wide(y)
    scale = 1 / x.shape[1] if gamma is None else gamma
    xx, yy, xy = ((scale * a @ b.T + 1).pow(3) for a, b in ((x, x), (y, y), (x, y)))
    rows = (xx + yy - xy - xy.T).fill_diagonal_(0).sum(1)  # [N]
    whole = rows.sum()
    without = (whole - 2 * rows) / ((count - 1) * (count - 2))  # [N]
    error = ((count - 1) * without.var(correction=0)).sqrt()
    return KernelDistance(float(whole / (count * (count - 1))), float(error))
