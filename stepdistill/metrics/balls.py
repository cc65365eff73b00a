"""Who lies near whom: what precision, recall, density and coverage count, in one pass over all distances.

Around every feature lies the ball that reaches to the k-th nearest other feature of its own set; the balls of a set
stand for the region that it fills (Kynkäänniemi et al. 2019, 1904.06991; Naeem et al. 2020, 2002.09797).
Distances are computed in float64, in blocks of rows so that memory is bounded; nothing is subsampled. The boundary
belongs to a ball, to within rounding, so that a count depends neither on blocks nor on order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Balls:
    """Who lies in whose ball.

    Attributes:
        nearest: k.
        holding: for each drawn feature, how many balls of real features hold it, [N] int64.
        covered: for each real feature, whether a ball of a drawn feature holds it, [M] bool.
        reached: for each real feature, whether its own ball holds a drawn feature, [M] bool.
    """

    nearest: int
    holding: Tensor
    covered: Tensor
    reached: Tensor

    @staticmethod
    def between(real: Tensor, drawn: Tensor, nearest: int, *, block: int = 1024) -> Balls:
        """The balls of real features [M, D] and drawn features [N, D].

        Args:
            real: features [M, D], M > nearest.
            drawn: features [N, D], N > nearest.
            nearest: k, at least 1.
            block: rows of the distance matrix held at a time.

        Raises:
            ValueError: a set has no k-th nearest other feature.
        """
        if min(len(real), len(drawn)) <= nearest or nearest < 1:
            raise ValueError(
                f"balls to the nearest {nearest} need more features than that on both sides, and at least one "
                f"neighbour; there are {len(real)} and {len(drawn)} features"
            )
        real, drawn = real.detach().double().cpu(), drawn.detach().double().cpu()
        rounding = 1e-12 * float(max(x.square().sum(1).max() for x in (real, drawn)))
        real_radius, drawn_radius = (
            _radius(x, nearest, block) + rounding for x in (real, drawn)
        )  # [M], [N], squared
        holding = []
        covered = torch.zeros(len(real), dtype=torch.bool)
        reached = torch.zeros(len(real), dtype=torch.bool)
        for rows, radius in zip(torch.split(drawn, block), torch.split(drawn_radius, block), strict=True):
            distance = _squared_distances(rows, real)  # [block, M]
            inside = distance <= real_radius
            holding.append(inside.sum(1))
            reached |= inside.any(0)
            covered |= (distance <= radius[:, None]).any(0)
        return Balls(nearest, torch.cat(holding), covered, reached)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] of x [N, D] and y [M, D]."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _radius(x: Tensor, nearest: int, block: int) -> Tensor:
    """The squared distance [N] of every row of x [N, D] to the k-th nearest other row."""
    found = []
    for start in range(0, len(x), block):
        distance = _squared_distances(x[start : start + block], x)
        own = torch.arange(len(distance))
        distance[own, start + own] = torch.inf
        found.append(distance.kthvalue(nearest, 1).values)
    return torch.cat(found)
