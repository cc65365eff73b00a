"""Rows of named tensors, each computed once: a few are kept in memory, all others in shards on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from stepdistill.data.shards import Shards, Tensors, grouped
from stepdistill.data.sizes import Wanted, rows_size
from stepdistill.families.condition import Condition, joined
from stepdistill.system.log import bar
from stepdistill.system.processes import ALONE, Processes

MEMORY_ROWS, MEMORY_BYTES = 4096, 2**27
"""Up to so many rows, of so many bytes in all, stay in memory."""

SHARD, SHARD_BYTES = 256, 2**29
"""Rows in one file; CHUNK where those would be more bytes."""

CHUNK = 64
"""Rows that are computed together."""

PROBED = 16
"""Rows, spread over all, by which their size is known."""


class RowCache:
    """Rows of named tensors; :meth:`make` makes those that are missing.

    Args:
        count: number of rows.
        compute: indices -> tensors with those rows; of sequences, padded where a mask says so, see ``joined``.
        place: the folder of the shards, asked for only where rows do not stay in memory; its name says all that they
            depend on. Shards that are there already are kept, so an interrupted run goes on.
        what: what they are, for messages.
        remake: whether damaged shards are made again.

    Attributes:
        on_disk: whether rows are read from the disk when they are taken.
    """

    def __init__(
        self,
        count: int,
        compute: Callable[[list[int]], Tensors],
        place: Callable[[], Path],
        what: str = "rows",
        remake: bool = False,
    ) -> None:
        self.count, self._compute = count, compute
        probed = min(count, PROBED)
        first = Condition(compute([i * count // probed for i in range(probed)]))
        self._size = size = rows_size(what, count, first.tensors)
        self._kept: Tensors | None = None
        if probed == count or not size.bytes:
            self._kept = _on_cpu(first.tensors)
        self.on_disk = self._kept is None and not (count <= MEMORY_ROWS and size.bytes <= MEMORY_BYTES)
        self._each = SHARD if SHARD * size.row <= SHARD_BYTES else CHUNK
        self._lengths: dict[str, int] = {}
        if self.on_disk:
            self._shards = Shards(place(), "rows", remake)

    def wanted(self) -> Wanted | None:
        """What is to be written; None where rows stay in memory."""
        if not self.on_disk:
            return None
        there = min(self.count, self._each * self._shards.there(self._numbers))
        return Wanted(self._size, self._shards.folder, there)

    def make(self, processes: Processes = ALONE) -> RowCache:
        """Computes what is missing.

        Args:
            processes: who share the work; each is to do this.

        Raises:
            UserError: a shard on the disk is damaged.
        """
        if self.on_disk:
            processes.together(lambda: self._make(processes))
            for number in self._numbers:
                for name, shape in self._shards.shapes(number).items():
                    self._lengths[name] = max(shape[1] if len(shape) > 1 else 0, self._lengths.get(name, 0))
        elif self._kept is None:
            self._kept = self._computed(range(self.count))
        return self

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows [B, ...] of ``index`` [B], sequences as long as the longest of all rows."""
        if self._kept is not None:
            return {name: value[index] for name, value in self._kept.items()}
        rows, found = index.tolist(), dict[str, Tensor]()
        for number, places in grouped([row // self._each for row in rows]).items():
            own = [rows[place] % self._each for place in places]
            for name in self._lengths:
                value = self._padded(name, self._shards.rows(number, name, own))
                every = found.setdefault(name, value.new_empty(len(rows), *value.shape[1:]))
                every[places] = value
        return found

    @property
    def _numbers(self) -> range:
        return range(-(-self.count // self._each))

    def _make(self, processes: Processes) -> None:
        if not (missing := self._shards.missing(self._numbers, processes)):
            return
        shown = bar(len(missing) * self._each, self._size.what, unit="row", shown=processes.main, lazy=True)
        for number in missing:
            rows = range(number * self._each, min((number + 1) * self._each, self.count))
            self._shards.write(number, self._computed(rows))
            shown.update(len(rows))
        shown.close()

    def _computed(self, rows: Sequence[int]) -> Tensors:
        parts = [self._compute(list(rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)]
        return joined([Condition(_on_cpu(part)) for part in parts]).tensors

    def _padded(self, name: str, value: Tensor) -> Tensor:
        missing = self._lengths[name] - value.shape[1] if value.ndim > 1 else 0
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)) if missing else value


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: value.cpu() for name, value in tensors.items()}
