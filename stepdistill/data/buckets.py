"""Sizes of one area and several aspect ratios, and whose turn it is at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.draws import generator_for
from stepdistill.families.base import Family
from stepdistill.families.size import Size

STEPS = 16
"""Sides differ by about a sixteenth of the square's side: 64 pixels at 1024."""

LONGEST = 2.0
"""The longer side over the shorter one, at most."""


def bucket_sizes(family: Family, pipe: Any, size: Size) -> list[Size]:
    """``size`` and others of about its area, with ratios of the sides from 1/2 to 2, all sides multiples of what the
    pipeline draws."""
    unit, side = family.unit(pipe), math.sqrt(size.height * size.width)
    step, found = unit * max(1, round(side / STEPS / unit)), [size]
    for height in range(step, int(side * math.sqrt(LONGEST)) + step, step):
        width = max(1, round(size.height * size.width / height / step)) * step
        ratio = math.log(height / width)
        apart = min(abs(ratio - math.log(each.height / each.width)) for each in found)
        if abs(ratio) <= math.log(LONGEST) + 1e-9 and apart > 0.02:
            found.append(Size(height, width))
    return found


def turn(counts: Sequence[int], step: int, batch: int, seed: int) -> tuple[int, Tensor]:
    """Which bucket the batch of a step is of, and the places [batch] of its samples in an endless sequence of
    reshuffled passes over the images of that bucket.

    In each round every bucket with an image has as many batches as its images fill, rounded, and at least one; their
    order is drawn anew.
    """
    batches = [max(1, round(count / batch)) if count else 0 for count in counts]
    rounds, slot = divmod(step, sum(batches))
    number = int(permutation(sum(batches), seed, "buckets", rounds)[slot])
    bucket = 0
    while number >= batches[bucket]:
        number -= batches[bucket]
        bucket += 1
    first = (rounds * batches[bucket] + number) * batch
    return bucket, torch.arange(first, first + batch)


@lru_cache(maxsize=6)
def permutation(count: int, seed: int, stream: str, epoch: int) -> Tensor:
    """The order [count] of one pass over so many samples."""
    return torch.randperm(count, generator=generator_for(seed, "order", stream, epoch))


def shuffled(position: Tensor, count: int, seed: int, stream: str) -> Tensor:
    """The sample at each of the positions [B], one after the other, of an endless sequence of reshuffled passes over
    ``count`` samples."""
    first, last = (int(position[i]) // count for i in (0, -1))
    passes = [permutation(count, seed, stream, epoch) for epoch in range(first, last + 1)]
    return (passes[0] if first == last else torch.cat(passes))[position - first * count]
