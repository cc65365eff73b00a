"""Random numbers that belong to (seed, stream, step, sample) and to nothing else.

Nothing in training uses the global generator. A number drawn for sample i of the global batch is the same whether the
batch is drawn whole, in two halves, by two processes, or again after a resume: that is what makes those four equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.system.memory import sent


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of the key: equal keys give equal streams, different keys unrelated ones."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of samples first .. first + count - 1 of the global batch at one step.

    Attributes:
        seed: the run's seed.
        step: optimiser step, from 0.
        first: index of the first sample in the global batch (over processes and accumulation).
        count: number of samples B.
        device: where the drawn tensors go; drawing itself is on the CPU, so that devices agree.
    """

    seed: int
    step: int
    first: int
    count: int
    device: torch.device = torch.device("cpu")

    def _each(self, stream: str) -> list[torch.Generator]:
        return [generator_for(self.seed, stream, self.step, self.first + i) for i in range(self.count)]

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers [B, *shape], float32."""
        rows = [torch.randn(shape, generator=generator) for generator in self._each(stream)]
        return sent(torch.stack(rows), self.device)

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high), shape [B], float32."""
        rows = [torch.rand((), generator=generator) for generator in self._each(stream)]
        return low + (high - low) * sent(torch.stack(rows), self.device)

    def integers(self, stream: str, high: int) -> Tensor:
        """Integers in 0 .. high - 1, shape [B], int64."""
        rows = [torch.randint(high, (), generator=generator) for generator in self._each(stream)]
        return sent(torch.stack(rows), self.device)

    def shared_integer(self, stream: str, high: int) -> int:
        """One integer in 0 .. high - 1 that every sample and every process sees at this step."""
        return int(torch.randint(high, (), generator=generator_for(self.seed, stream, self.step)))

    def part(self, start: int, count: int) -> Draws:
        """The draws of a slice of these samples."""
        return replace(self, first=self.first + start, count=count)
