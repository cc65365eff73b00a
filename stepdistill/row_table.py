"""What the networks said of many images, in the order of the images: from these rows every score is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Tensors [B, ...] by name, a row an image, such as ``features`` [B, D] and ``clip_score`` [B]."""


class RowTable:
    """Rows in memory, batch by batch."""

    def __init__(self) -> None:
        self._batches: list[Rows] = []
        self.count = 0

    def add(self, rows: Rows) -> None:
        """Take in the rows of the images that follow."""
        self._batches.append(rows)
        self.count += len(next(iter(rows.values())))

    def __contains__(self, name: object) -> bool:
        return bool(self._batches) and name in self._batches[0]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows [B, ...] of one name, some at a time."""
        for rows in self._batches:
            yield rows[name]

    def whole(self, name: str) -> Tensor:
        """All rows [N, ...] of one name."""
        return torch.cat(list(self.blocks(name)))
