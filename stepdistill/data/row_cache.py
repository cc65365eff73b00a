"""Rows of named tensors, computed once and kept where they fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CACHE_BYTES = 2**31
"""Conditions (or latents) are computed once and kept while they are smaller than this in all."""


class Rows:
    """Rows of named tensors computed on request, or once and for all where they fit in memory.

    Args:
        count: number of rows.
        compute: indices -> tensors with those rows.
    """

    def __init__(self, count: int, compute: Callable[[list[int]], dict[str, Tensor]]) -> None:
        self.count, self.compute = count, compute
        self.kept: dict[str, Tensor] | None = None
        first = compute([0])
        size = sum(value.numel() * value.element_size() for value in first.values()) * count
        if size <= CACHE_BYTES:
            parts = [self._cpu(list(range(i, min(i + 64, count)))) for i in range(0, count, 64)]
            self.kept = {name: torch.cat([part[name] for part in parts]) for name in first}

    def _cpu(self, index: list[int]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.compute(index).items()}

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows [B, ...] of ``index`` [B]. Outside the cache they are computed one by one, so that a row is the same
        number for number whatever stands beside it in the batch."""
        if self.kept is not None:
            return {name: value[index] for name, value in self.kept.items()}
        parts = [self.compute([int(i)]) for i in index]
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
