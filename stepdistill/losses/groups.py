"""Samples of one prompt beside each other (``train.group``), and how much better one is than the others.

What needs no gradient of a reward learns by that: a number that is added to all rewards of a prompt, as a prompt that
is an easy one adds it, is no merit of a sample.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST = 1e-4
"""Added to a deviation, so that samples that are all alike are none better than the others."""


def mean_of_group(values: Tensor, group: int) -> Tensor:
    """The mean over each ``group`` consecutive rows of [B, ...], for each of them."""
    means: Tensor = values.unflatten(0, (-1, group)).mean(1)
    return means.repeat_interleave(group, 0)


def centred(values: Tensor, group: int) -> Tensor:
    """Values [B, ...] less the mean of their group."""
    return values - mean_of_group(values, group)


def standardised(values: Tensor, group: int) -> Tensor:
    """Values [B, ...] less the mean of their group, over its deviation; zeros in a group of one."""
    apart = centred(values, group)
    return apart / (mean_of_group(apart.square(), group).sqrt() + SMALLEST)


def advantages(scores: Tensor, group: int) -> Tensor:
    """How much better each sample is than the others of its group, [B]: the sum over rewards, each standardised, and
    that standardised again.

    Args:
        scores: of M rewards, [M, B].
        group: consecutive samples of one prompt.
    """
    return standardised(standardised(scores.T, group).sum(1), group)
