"""Confidence intervals of metrics: of means in closed form, of anything else by resampling images.

An interval speaks of the drawn images alone: how far the number would move with other seeds. It knows nothing of the
bias that a metric has at a given N, which moves the whole interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from stepdistill.metrics.float64 import wide


@dataclass(frozen=True)
class Interval:
    """A normal interval around a value.

    Attributes:
        value: the metric on all images.
        standard_error: of it.
        level: probability, as 0.95.
    """

    value: float
    standard_error: float
    level: float = 0.95

    @property
    def low(self) -> float:
        """The lower end."""
        return self.value - self._reach

    @property
    def high(self) -> float:
        """The upper end."""
        return self.value + self._reach

    @property
    def _reach(self) -> float:
        return NormalDist().inv_cdf((1 + self.level) / 2) * self.standard_error


def of_mean(values: Tensor, *, level: float = 0.95) -> Interval:
    """Of a mean over images, from one number an image [N]: CLIP score, precision, density. Not of recall and coverage,
    which are means over the real images.

    Raises:
        ValueError: fewer than two numbers.
    """
    _check(len(values))
    numbers = wide(values)
    return Interval(float(numbers.mean()), float(numbers.std()) / math.sqrt(len(numbers)), level)


def jackknife(
    statistic: Callable[[Tensor], float], count: int, *, groups: int = 20, level: float = 0.95, seed: int = 0
) -> Interval:
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
    return from_leaving_out(statistic(torch.arange(count)), values, level=level)


def from_leaving_out(value: float, without: Tensor, *, level: float = 0.95) -> Interval:
    """The jackknife of a value from those without one group of images each [G].

    Raises:
        ValueError: fewer than two groups.
    """
    _check(len(without))
    variance = float(wide(without).var(correction=0))
    return Interval(value, math.sqrt((len(without) - 1) * variance), level)


def _check(count: int) -> None:
    if count < 2:
        raise ValueError(f"an interval needs at least 2 values, there is {count}")
