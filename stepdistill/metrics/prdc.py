"""Precision, recall, density and coverage: balls around the nearest neighbours of two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.metrics.blocks import rows_at_once
from stepdistill.metrics.float64 import wide


@dataclass(frozen=True)
class Balls:
    """Who lies in whose ball.

    Attributes:
        nearest: k.
        holding: for each drawn feature, how many balls of real features hold it, [N] int64.
        covered: for each real feature, whether a ball of a drawn feature holds it, [M] bool.
        reached: for each real feature, whether its own ball holds a drawn feature, [M] bool.
        covered_without, reached_without: the last two where the drawn features i, i + G, i + 2 G, ... are left out, for
            every i < G, [G, M] bool; [0, M] where that was not asked. Recall and coverage are means over the real
            features of what the drawn ones do to them together, so that their spread over seeds is no mean's: the
            jackknife reads it from these. For it the drawn features must have no pattern in their order.
    """

    nearest: int
    holding: Tensor
    covered: Tensor
    reached: Tensor
    covered_without: Tensor
    reached_without: Tensor

    @staticmethod
    def between(real: Tensor, drawn: Tensor, nearest: int, *, groups: int = 0, block: int = 1024) -> Balls:
        """The balls of real features [M, D] and drawn features [N, D] of one device, computed there.

        Args:
            real: features [M, D], M > nearest.
            drawn: features [N, D], N > nearest.
            nearest: k, at least 1.
            groups: G, for what is left when one of so many groups of drawn features is left out; 0 leaves that out.
            block: rows of the distance matrix held at a time, fewer where they are long.

        Raises:
            ValueError: a set has no k-th nearest other feature, also without a group.
        """
        largest = -(-len(drawn) // groups) if groups else 0
        if min(len(real), len(drawn) - largest) <= nearest or nearest < 1:
            raise ValueError(
                f"balls to the nearest {nearest} need more features than that on both sides, and at least one "
                f"neighbour; there are {len(real)} and {len(drawn)} features"
            )
        real, drawn = wide(real), wide(drawn)
        rounding = 1e-12 * float(max(x.square().sum(1).max() for x in (real, drawn)))
        real_radius, drawn_radius = (
            _radius(x, nearest, block) + rounding for x in (real, drawn)
        )  # [M], [N], squared
        without = _radii_without(drawn, nearest, groups, block) + rounding  # [N, G], squared
        holding = drawn.new_zeros(len(drawn), dtype=torch.int64)
        covered, reached = drawn.new_zeros(2, len(real), dtype=torch.bool)
        covered_without, reached_by = drawn.new_zeros(2, groups, len(real), dtype=torch.bool)
        block = rows_at_once(len(real), block)
        for start in range(0, len(drawn), block):
            part = slice(start, start + block)
            distance = _squared_distances(drawn[part], real)  # [block, M]
            inside = distance <= real_radius
            holding[part] = inside.sum(1)
            reached |= inside.any(0)
            covered |= (distance <= drawn_radius[part, None]).any(0)
            for group in range(groups):
                reached_by[group] |= inside[(group - start) % groups :: groups].any(0)
                covered_without[group] |= (distance <= without[part, group, None]).any(0)
        reached_without = reached_by.sum(0) > reached_by.int()  # by another group than the one left out
        return Balls(nearest, holding, covered, reached, covered_without, reached_without)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, M] of x [N, D] and y [M, D]."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _radius(x: Tensor, nearest: int, block: int) -> Tensor:
    """The squared distance [N] of every row of x [N, D] to the k-th nearest other row."""
    found, block = x.new_empty(len(x)), rows_at_once(len(x), block)
    # Into one tensor: small ones in between would split the freed memory.
    for start in range(0, len(x), block):
        distance = _squared_distances(x[start : start + block], x)
        own = torch.arange(len(distance), device=x.device)
        distance[own, start + own] = torch.inf
        found[start : start + block] = distance.kthvalue(nearest, 1).values
    return found


def _radii_without(x: Tensor, nearest: int, groups: int, block: int) -> Tensor:
    """The same [N, G] for every group of rows i, i + G, ... that is left out; minus infinity for its own rows."""
    found, block = x.new_empty(len(x), groups), rows_at_once(len(x), block)
    for start in range(0, len(x) if groups else 0, block):
        distance = _squared_distances(x[start : start + block], x)
        own = torch.arange(start, start + len(distance), device=x.device)
        distance[own - start, own] = torch.inf
        # A few more than k neighbours are enough, as it is rare that many of them are of one group.
        near = distance.topk(min(4 * nearest, len(x) - 1), largest=False)
        for group in range(groups):
            rank = (near.indices % groups != group).cumsum(1)  # of those that are left
            enough = rank[:, -1] >= nearest
            place = (rank < nearest).sum(1).clamp_max(rank.shape[1] - 1)
            radius = near.values.gather(1, place[:, None])[:, 0]
            if not enough.all():
                left = distance[~enough][:, torch.arange(len(x), device=x.device) % groups != group]
                radius[~enough] = left.kthvalue(nearest, 1).values
            radius[own % groups == group] = -torch.inf
            found[start : start + block, group] = radius
    return found


def coverage(balls: Balls) -> float:
    """In [0, 1]: the mean over real features of whether its ball holds a drawn feature."""
    return float(balls.reached.double().mean())


def density(balls: Balls) -> float:
    """At least 0, and not bounded by 1: the mean over drawn features of the number of real balls around it, over k."""
    return float(balls.holding.double().mean() / balls.nearest)


def precision(balls: Balls) -> float:
    """In [0, 1]: the mean over drawn features of whether any real ball holds it."""
    return float((balls.holding > 0).double().mean())


def recall(balls: Balls) -> float:
    """In [0, 1]: the mean over real features of whether any drawn ball holds it."""
    return float(balls.covered.double().mean())
