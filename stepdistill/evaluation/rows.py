"""What the networks said of many images, in the order of the images: from these rows every score is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Tensors [B, ...] by name, a row an image, such as ``features`` [B, D] and ``clip_score`` [B]."""


class RowTable(ABC):
    """Rows of images, wherever they are kept; see ``shards``.

    Attributes:
        count: how many images.
    """

    count: int

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether the rows have this name."""

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows [B, ...] of one name in order, some at a time."""

    def whole(self, name: str) -> Tensor:
        """All rows [N, ...] of one name."""
        return torch.cat(list(self.blocks(name)))

    def on(self, device: torch.device | str) -> RowTable:
        """The same rows, which come to a device as they are read."""
        return _Moved(self, torch.device(device))


class _Moved(RowTable):
    def __init__(self, table: RowTable, device: torch.device) -> None:
        self.count, self._table, self._device = table.count, table, device

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def blocks(self, name: str) -> Iterator[Tensor]:
        return (block.to(self._device) for block in self._table.blocks(name))


class HeldRows(RowTable):
    """Rows in memory."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        self._rows, self.count = rows, len(next(iter(rows.values())))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def blocks(self, name: str) -> Iterator[Tensor]:
        yield self._rows[name]
