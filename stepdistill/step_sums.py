"""Sums over what one optimiser step has seen: in all parts of the batch and on every process."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


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
