"""FID-infinity: the Frechet distance at N without end, from its straight line over 1/N (Chong and Forsyth 2020,
1911.07023, sec. 3).

The distance of N images is too large by about a constant over N, and that constant differs between models: at finite N
they may be ranked by it. Here the images, in random order, are cut into 6, 4, 3 and 2 parts and taken whole, so that
every image counts once at each size; the mean distance of the parts is fitted by a line over 1/n, whose value at 0 is
the result. (The paper draws 15 random subsets.) The reference has a bias of its own, which stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.standard_errors import Estimate, jackknife

PARTS = (6, 4, 3, 2, 1)


@dataclass(frozen=True)
class FrechetInfinity:
    """The line and its end.

    Attributes:
        value: the distance at N without end, with its standard error where asked for (0 else).
        slope: of the line: the distance of n images is about ``value + slope / n``.
        sizes: images of a part, on average.
        distances: the mean distance of parts of each size.
    """

    value: Estimate
    slope: float
    sizes: tuple[float, ...]
    distances: tuple[float, ...]


def fid_infinity(features: Tensor, reference: Moments, *, groups: int = 0, seed: int = 0) -> FrechetInfinity:
    """Of features [N, D] against the moments of a reference.

    Args:
        features: [N, D]; the line is straight where the smallest part, N / 6, has more images than dimensions.
        reference: of the real images.
        groups: for the standard error, by leaving out one of so many groups of images at a time (10 is enough), each of
            which costs as much as the value; 0 leaves it out.
        seed: of the random order.

    Raises:
        ValueError: fewer than 12 images: a part needs two.
    """
    count = len(features)
    if count < 2 * max(PARTS):
        raise ValueError(f"FID-infinity needs at least {2 * max(PARTS)} images, there are {count}")
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    distances = _distances(shuffled, reference)
    value, slope = _line(count, distances)
    if groups:
        spread = jackknife(
            lambda kept: _line(len(kept), _distances(shuffled[kept], reference))[0],
            count,
            groups=groups,
            seed=seed,
        )
        estimate = Estimate(value, spread.standard_error)
    else:
        estimate = Estimate(value, 0.0)
    return FrechetInfinity(estimate, slope, tuple(count / parts for parts in PARTS), distances)


def _distances(features: Tensor, reference: Moments) -> tuple[float, ...]:
    """The mean distance of the parts, for every number of parts."""
    twelfths = features.tensor_split(
        12
    )  # they add up to every part, so that outer products are summed only once
    straight = len(features) >= 6 * features.shape[1]
    summed = [Moments.of(part) for part in twelfths] if straight else []
    found = []
    for parts in PARTS:
        each = 12 // parts
        values = []
        for start in range(0, 12, each):
            if straight:
                values.append(
                    frechet_distance(reduce(Moments.merge, summed[start : start + each]), reference)
                )
            else:
                piece = torch.cat(twelfths[start : start + each])
                values.append(frechet_distance_of_features(piece, reference))
        found.append(sum(values) / parts)
    return tuple(found)


def _line(count: int, distances: tuple[float, ...]) -> tuple[float, float]:
    """Value at 0 and slope of the least-squares line over 1/n."""
    x = torch.tensor([parts / count for parts in PARTS], dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    centred = x - x.mean()
    slope = float((centred * y).sum() / centred.square().sum())
    return float(y.mean()) - slope * float(x.mean()), slope
