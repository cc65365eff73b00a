"""Running means that are the same for all parts of a batch and all processes."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


class StepSums:
    """Collects float64 vectors [S] during a step and gives their sum once, after it.

    A running mean that follows these sums is the same for all parts of a batch and all processes, as it holds still
    while they are taken.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def add(self, sums: Tensor) -> None:
        """Takes in the sums [S] of one part of the batch."""
        self._seen.append(sums.double())

    def take(self) -> Tensor | None:
        """The sum [S] over all parts and processes since the last call; None where nothing was seen."""
        if not self._seen:
            return None
        total = torch.stack(self._seen).sum(0)
        self._seen.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total


class Balance(nn.Module):
    """The ratio of the mean sizes of two gradients, from running means over steps and processes.

    Held from one step to the next, it is the same for all parts of a batch.

    Args:
        decay: of the running means, at each update.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))
        self.means: Tensor
        self._seen = StepSums()  # sums and counts of both

    @property
    def ratio(self) -> Tensor:
        """Mean size of the first over that of the second, a scalar; 1 before both were seen."""
        return torch.where((self.means > 0).all(), self.means[0] / self.means[1], 1.0)

    def see(self, first: Tensor, second: Tensor) -> None:
        """Takes in the sizes of some samples of either, each [B], which may be empty."""
        sums = [first.sum(), second.sum()]
        counts = [first.new_full((), len(sizes)) for sizes in (first, second)]
        self._seen.add(torch.stack([*sums, *counts]))

    def update(self) -> None:
        """Moves the means by what the step has seen, on every process."""
        seen = self._seen.take()
        if seen is None:
            return
        now, seen_any = (seen[:2] / seen[2:]).to(self.means.dtype), seen[2:] > 0
        moved = torch.where(self.means == 0, now, self.means.lerp(now, 1 - self.decay))
        self.means.copy_(torch.where(seen_any, moved, self.means))
