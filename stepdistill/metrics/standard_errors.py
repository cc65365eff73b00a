"""Standard errors of metrics: of means in closed form, of anything else by resampling images.

An error speaks of the drawn images alone: how far the number would move with other seeds. It knows nothing of the bias
that a metric has at a given N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.metrics.float64 import wide


@dataclass(frozen=True)
class Estimate:
    """A value and how sure it is.

    Attributes:
        value: the metric on all images.
        standard_error: of it.
    """

    value: float
    standard_error: float


def of_mean(values: Tensor) -> Estimate:
    """Of a mean over images, from one number an image [N]: CLIP score, precision, density. Not of recall and coverage,
    which are means over the real images.

    Raises:
        ValueError: fewer than two numbers.
    """
    _check(len(values))
    numbers = wide(values)
    return Estimate(float(numbers.mean()), float(numbers.std()) / math.sqrt(len(numbers)))


def jackknife(
    statistic: Callable[[Tensor], float], count: int, *, groups: int = 20, seed: int = 0
) -> Estimate:
    """Of any statistic of ``count`` images, by leaving out one group of them at a time, at ``groups`` + 1 evaluations.
    The groups are random and of nearly equal size; no image is repeated, which would upset nearest neighbours.

    Raises:
        ValueError: fewer than two groups, or fewer images than groups.
    """
    _check(groups)
    if count < groups:
        raise ValueError(f"a jackknife of {groups} groups needs that many images, there are {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(groups)
    values = torch.tensor(
        [statistic(torch.cat([*parts[:i], *parts[i + 1 :]]).sort().values) for i in range(groups)],
        dtype=torch.float64,
    )
    return from_leaving_out(statistic(torch.arange(count)), values)


def from_leaving_out(value: float, without: Tensor) -> Estimate:
    """The jackknife of a value from those without one group of images each [G].

    Raises:
        ValueError: fewer than two groups.
    """
    _check(len(without))
    variance = float(wide(without).var(correction=0))
    return Estimate(value, math.sqrt((len(without) - 1) * variance))


def _check(count: int) -> None:
    if count < 2:
        raise ValueError(f"a standard error needs at least 2 values, there is {count}")
