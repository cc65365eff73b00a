"""The batches of a run, which may go back."""

from __future__ import annotations

from collections.abc import Generator

from stepdistill.data.batches import Data
from stepdistill.losses.batch import Batch


class Feed:
    """The samples of one process, update by update.

    Args:
        data: where they come from.
        updates: of the whole run.
        first, count: of the process among those of an update.
        size: samples of an update, in all.
    """

    def __init__(self, data: Data, updates: int, first: int, count: int, size: int) -> None:
        self._data, self._updates, self._which = data, updates, (first, count, size)
        self._next = -1
        self._batches: Generator[Batch] | None = None

    def at(self, step: int) -> Batch:
        """The batch of a step; the one after the last that was asked for is at hand."""
        if self._batches is None or step != self._next:
            self.close()
            self._batches = self._data.batches(range(step, self._updates), *self._which)
        self._next = step + 1
        return next(self._batches)

    def close(self) -> None:
        """Ends the thread that makes them."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
