"""The standard error of a Frechet distance: from moments kept in groups while images stream by, and of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_between
from stepdistill.metrics.standard_errors import Estimate, jackknife

GROUPS = 20
"""How many: 20 know the error to about 16 %."""


def frechet_estimate(groups: Sequence[Moments], reference: Moments) -> Estimate:
    """The distance of all groups together, with the jackknife's error: one group left out at a time, whose moments are
    subtracted, so that it costs a distance a group and no second pass over features.

    Args:
        groups: moments of random groups of nearly equal size; those without images are left out.
        reference: of the real images.

    Raises:
        ValueError: fewer than two groups have images, or too few images remain without one.
    """
    filled = [group for group in groups if group.count]
    if len(filled) < 2:
        raise ValueError(f"a jackknife needs at least 2 groups of images, there are {len(filled)}")
    whole = reduce(Moments.merge, filled)
    values = torch.tensor(
        [
            frechet_distance(
                Moments(whole.count - group.count, whole.total - group.total, whole.outer - group.outer),
                reference,
            )
            for group in filled
        ],
        dtype=torch.float64,
    )
    error = math.sqrt((len(filled) - 1) * float(values.var(correction=0)))
    return Estimate(frechet_distance(whole, reference), error)


def paired_frechet_estimate(x: Tensor, y: Tensor) -> Estimate:
    """The distance between features of pairs, which may depend on each other, such as pictures of one prompt and noise.
    Its error is the jackknife's that leaves a group out of both sides together: other seeds move both.

    Args:
        x, y: features [N, D], N >= 3.

    Raises:
        ValueError: fewer than 3 pairs, or of two numbers.
    """
    count = len(x)
    if count < 3 or len(y) != count:
        raise ValueError(f"a paired jackknife needs at least 3 pairs, there are {count} and {len(y)}")
    return jackknife(
        lambda kept: frechet_distance_between(x[kept], y[kept]), count, groups=min(GROUPS, count)
    )
