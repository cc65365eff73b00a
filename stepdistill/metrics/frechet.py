"""Frechet distance between two sets of features, each seen as a Gaussian (Heusel et al. 2017, 1706.08500, eq. 6).

    FD = |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2)

Sums are float64 throughout. The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which
are real by construction, so there is no imaginary part to drop and no ridge to add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, sum and sum of outer products of features: they add up over batches and processes in any order.

    Attributes:
        count: number of features N.
        total: their sum [D], float64.
        outer: the sum of their outer products [D, D], float64.
    """

    count: int
    total: Tensor
    outer: Tensor

    @staticmethod
    def empty(dimension: int) -> Moments:
        """Of no features."""
        zeros = torch.zeros(dimension, dtype=torch.float64)
        return Moments(0, zeros, torch.zeros(dimension, dimension, dtype=torch.float64))

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Of features [N, D]."""
        wide = features.detach().double().cpu()
        return Moments(len(wide), wide.sum(0), wide.T @ wide)

    @staticmethod
    def from_statistics(mean: Tensor, covariance: Tensor, count: int) -> Moments:
        """From a mean [D] and an unbiased covariance [D, D], as reference files store them."""
        mean, covariance = mean.double().cpu(), covariance.double().cpu()
        return Moments(count, mean * count, covariance * (count - 1) + count * torch.outer(mean, mean))

    def add(self, features: Tensor) -> None:
        """Take in features [B, D]."""
        more = Moments.of(features)
        self.count += more.count
        self.total += more.total
        self.outer += more.outer

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """[D], float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased (N - 1) covariance [D, D], float64; needs two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, there are {self.count}")
        centred = self.outer - self.count * torch.outer(self.mean, self.mean)
        return (centred + centred.T) / (2 * (self.count - 1))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a positive semi-definite matrix [D, D]; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance between two sets of which only the moments are kept. Symmetric; tiny negatives (1e-4 for 2,048
    features with N < D) are rounding of near-equal sets and are left as they are."""
    root = symmetric_root(a.covariance)
    values = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0)
    spread = a.covariance.trace() + b.covariance.trace() - 2 * values.sqrt().sum()
    return float((a.mean - b.mean).square().sum() + spread)


def frechet_distance_of_features(features: Tensor, b: Moments) -> float:
    """The same distance from features [N, D] themselves, better where N < D: with A = X^T X / (N - 1) for centred X,
    tr (A B)^1/2 is the nuclear norm of X B^1/2 over (N - 1)^1/2, an N x D problem without a rank-deficient root."""
    wide = features.detach().double().cpu()
    mean = wide.mean(0)
    centred = (wide - mean) / (len(wide) - 1) ** 0.5  # [N, D]
    nuclear = torch.linalg.svdvals(centred @ symmetric_root(b.covariance)).sum()
    spread = centred.square().sum() + b.covariance.trace() - 2 * nuclear
    return float((mean - b.mean).square().sum() + spread)
