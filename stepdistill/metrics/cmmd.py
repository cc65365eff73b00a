"""CMMD: MMD^2 with a Gaussian kernel on CLIP embeddings (Jayasumana et al. 2024, 2401.09603, sec. 4).

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)),  sigma = 10, times 1,000, on L2-normalised embeddings

The paper's numbers are of CLIP ViT-L/14 at 336 pixels and of the estimate that counts every sample with itself; both
are kept here so that numbers compare. That estimate is too large by about 10 (1 - mean cosine) (1/N + 1/M).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stepdistill.metrics.float64 import wide
from stepdistill.metrics.mmd import KernelDistance, mean_discrepancy

SIGMA = 10.0
SCALE = 1000.0


def cmmd(x: Tensor, y: Tensor, *, unbiased: bool = False, block: int = 1024) -> KernelDistance:
    """CMMD between embeddings x [N, D] and y [M, D], which are normalised here, with its standard error.

    Args:
        x: embeddings [N, D], N >= 3, of drawn images: the standard error is over them.
        y: embeddings [M, D], M >= 3, of real images.
        unbiased: leave out the pairs of a sample with itself; the paper's numbers do not.
        block: rows of the kernel matrix held at a time.

    Raises:
        ValueError: a side has fewer than 3 embeddings.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return (-squares.clamp_min(0) / (2 * SIGMA**2)).exp()

    x, y = (F.normalize(wide(side), dim=1) for side in (x, y))
    found = mean_discrepancy(x, y, kernel, with_itself=not unbiased, block=block)
    return KernelDistance(SCALE * found.value, SCALE * found.standard_error)
