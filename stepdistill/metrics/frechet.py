"""Frechet distance between two sets of features, each seen as a Gaussian (Heusel et al. 2017, 1706.08500, eq. 6).

    FD = |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2)

Sums are float64 throughout, on the device of the features or moments. tr (A B)^1/2 is the sum of the roots of the
eigenvalues of A B, and no root of a matrix is needed for it. Those eigenvalues are real and at least 0, since they are
also the eigenvalues of

    L^T B L, with A = L L^T (Cholesky)        where one side has more features than dimensions,
    X B X^T / (N - 1)                         where the centred features X [N, D] are few, an N x N problem,

and the roots are the singular values of X Y^T / ((N - 1)(M - 1))^1/2 where both sides have their features. There is no
imaginary part to drop and no ridge to add. N centred features have rank N - 1 at most: further eigenvalues are
rounding, whose roots would add up to 1e-4, and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.metrics.float64 import float64_device, wide

BLOCK = 512
"""Columns of a symmetric product made at a time: the half above the diagonal blocks is never computed."""


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
    def empty(dimension: int, device: torch.device | str = "cpu") -> Moments:
        """Of no features; a device without float64 leaves them on the CPU."""
        total = torch.zeros(dimension, dtype=torch.float64, device=float64_device(device))
        return Moments(0, total, total.new_zeros(dimension, dimension))

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Of features [N, D]."""
        x = wide(features)
        return Moments(len(x), x.sum(0), _gram(x))

    @staticmethod
    def from_statistics(mean: Tensor, covariance: Tensor, count: int) -> Moments:
        """From a mean [D] and an unbiased covariance [D, D], as reference files store them."""
        mean, covariance = wide(mean), wide(covariance)
        return Moments(count, mean * count, covariance * (count - 1) + count * torch.outer(mean, mean))

    def add(self, features: Tensor) -> None:
        """Take in features [B, D], on the device of the moments."""
        more = Moments.of(features.to(self.total.device))
        self.count += more.count
        self.total += more.total
        self.outer += more.outer

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets."""
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def on(self, device: torch.device | str) -> Moments:
        """The same on another device, or on the CPU where that has no float64."""
        device = float64_device(device)
        return Moments(self.count, self.total.to(device), self.outer.to(device))

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
    """The distance between two sets of which only the moments are kept, both on one device.

    Symmetric. Near-equal sets can come out a rounding below zero, and are left as they are.

    Raises:
        ValueError: a side has fewer than two features.
    """
    one, other = a.covariance, b.covariance
    factor = _cholesky(one, a.count)
    if factor is None:
        factor = _cholesky(other, b.count)
        if factor is None:  # both are singular
            root = symmetric_root(one)
            squares = torch.linalg.eigvalsh(root @ other @ root)
        else:
            squares = torch.linalg.eigvalsh(_congruence(factor, one))
    else:
        squares = torch.linalg.eigvalsh(_congruence(factor, other))
    shared = _root_sum(squares, min(a.count, b.count) - 1)
    return float((a.mean - b.mean).square().sum() + one.trace() + other.trace() - 2 * shared)


def frechet_distance_of_features(features: Tensor, b: Moments) -> float:
    """The same distance from features [N, D] themselves and the moments of the other side; for N <= D it needs neither
    their covariance nor a root of the other.

    Raises:
        ValueError: a side has fewer than two features.
    """
    count, dimension = features.shape
    if count > dimension:
        return frechet_distance(Moments.of(features), b)
    mean, centred = _centred(features)
    covariance = b.covariance
    squares = torch.linalg.eigvalsh(centred @ covariance @ centred.T)  # [N]
    shared = _root_sum(squares, min(count, b.count) - 1)
    spread = centred.square().sum() + covariance.trace() - 2 * shared
    return float((mean - b.mean).square().sum() + spread)


def frechet_distance_between(x: Tensor, y: Tensor) -> float:
    """The same distance from the features of both sides, x [N, D] and y [M, D].

    Where one side has at most D / 2 features, from the singular values of the N x M matrix of inner products: of all
    ways the most accurate (1e-12 of the traces, also for equal sets) and, for few features, the fastest.

    Raises:
        ValueError: a side has fewer than two features, or the dimensions differ.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"the two sets have {x.shape[1]} and {y.shape[1]} features an image")
    few, many = (x, y) if len(x) <= len(y) else (y, x)
    if 2 * len(few) > few.shape[1]:
        return frechet_distance_of_features(few, Moments.of(many))
    mean, centred = _centred(few)
    other_mean, other = _centred(many)
    shared = torch.linalg.svdvals(centred @ other.T)[: len(few) - 1].sum()
    spread = centred.square().sum() + other.square().sum() - 2 * shared
    return float((mean - other_mean).square().sum() + spread)


def _centred(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and centred features [N, D] over (N - 1)^1/2, so that X^T X is the covariance; float64."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 features, there are {len(features)}")
    x = wide(features)
    mean = x.mean(0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5


def _root_sum(squares: Tensor, rank: int) -> Tensor:
    """The sum of the roots of the largest ``rank`` of ascending eigenvalues."""
    return squares[max(len(squares) - rank, 0) :].clamp_min(0).sqrt().sum()


def _cholesky(covariance: Tensor, count: int) -> Tensor | None:
    """The lower factor of a covariance [D, D] of ``count`` features, None where it is singular."""
    if count <= len(covariance):
        return None
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if failed else factor


def _congruence(lower: Tensor, matrix: Tensor) -> Tensor:
    """The lower triangle of L^T B L for lower-triangular L [D, D] and symmetric B [D, D], in a third of the work."""
    product = torch.zeros_like(matrix)
    for start in range(0, len(matrix), BLOCK):
        columns = slice(start, start + BLOCK)
        right = matrix[start:, start:] @ lower[start:, columns]
        product[start:, columns] = lower[start:, start:].T @ right
    return product


def _gram(x: Tensor) -> Tensor:
    """X^T X [D, D] of X [N, D], in little more than half the work."""
    dimension = x.shape[1]
    product = x.new_empty(dimension, dimension)
    for start in range(0, dimension, BLOCK):
        stop = start + BLOCK
        product[start:, start:stop] = x[:, start:].T @ x[:, start:stop]
        product[start:stop, stop:] = product[stop:, start:stop].T
    return product
