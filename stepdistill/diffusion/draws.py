"""Random numbers that belong to (seed, stream, step, sample) and to nothing else.

Nothing in training uses the global generator. A number drawn for sample i of the global batch is the same whether the
batch is drawn whole, in two halves, by two processes, on another device, or again after a resume: that is what makes
those equal. The numbers of a batch are drawn at once, by a generator that counts (see ``philox_numpy``): its key is a
hash of (seed, stream), its counter says (step, sample, element).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from stepdistill.diffusion import philox


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of the key: equal keys give equal streams, different keys unrelated ones.

    For what is drawn once, such as an order or first weights; what belongs to the samples of a step is :class:`Draws`'.
    """
    return torch.Generator().manual_seed(int.from_bytes(_hashed(*key), "little") >> 1)


def _hashed(*key: int | str) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()[:8]


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> int:
    """Philox's key of 64 bits, signed as operators take integers."""
    return int.from_bytes(_hashed(seed, stream), "little", signed=True)


def normal_of(
    seed: int, stream: str, samples: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal numbers [B, *shape], float32, that belong to the samples [B], int64, at step 0."""
    drawn: Tensor = philox.normal(_key(seed, stream), 0, 0, samples, [len(samples), *shape], device)
    return drawn


@dataclass(frozen=True)
class Draws:
    """The random numbers of samples first .. first + count - 1 of the global batch at one step.

    Attributes:
        seed: the run's seed.
        step: update, from 0, below 2^32.
        first: index of the first sample in the global batch (over processes and accumulation).
        count: number of samples B; first + count is at most 2^32.
        device: where they are drawn, to the last bit the same on each; one without Triton gets those of the processor.
    """

    seed: int
    step: int
    first: int
    count: int
    device: torch.device = torch.device("cpu")

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers [B, *shape], float32; a sample has at most 2^34."""
        key = _key(self.seed, stream)
        drawn: Tensor = philox.normal(key, self.step, self.first, None, [self.count, *shape], self.device)
        return drawn

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high), shape [B], float32. Both are rounded to float32 first; where that makes them
        equal, every number is."""
        key = _key(self.seed, stream)
        drawn: Tensor = philox.uniform(key, self.step, self.first, self.count, low, high, self.device)
        return drawn

    def integers(self, stream: str, high: int) -> Tensor:
        """Integers in 0 .. high - 1, shape [B], int64.

        Raises:
            ValueError: high is not in 1 .. 2^32 - 1.
        """
        key = _key(self.seed, stream)
        drawn: Tensor = philox.integers(key, self.step, self.first, self.count, high, self.device)
        return drawn

    def shared_integer(self, stream: str, high: int) -> int:
        """One integer in 0 .. high - 1 that every sample and every process sees at this step; drawn on the processor.

        Raises:
            ValueError: high is not in 1 .. 2^32 - 1.
        """
        return philox.shared_integer(_key(self.seed, stream), self.step, high)

    def of_groups(self, size: int) -> Draws:
        """The draws of these samples' groups, one for each ``size`` consecutive samples of the global batch.

        Raises:
            ValueError: the samples are not whole groups.
        """
        if self.first % size or self.count % size:
            raise ValueError(f"samples {self.first} .. {self.first + self.count - 1} are no groups of {size}")
        return replace(self, first=self.first // size, count=self.count // size)

    def part(self, start: int, count: int) -> Draws:
        """The draws of a slice of these samples."""
        return replace(self, first=self.first + start, count=count)
