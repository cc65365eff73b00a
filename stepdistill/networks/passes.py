"""Network passes: how many samples the networks of a run were called with. One call of B samples is B passes, guided by
two outputs it is 2 B, whatever the call costs; two runs of as many passes have cost about the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

WITH, WITHOUT = "with_graph", "without_graph"


class Passes:
    """A sum of passes, by who was called.

    Attributes:
        by_network: who -> passes ``with_graph``, which a backward pass may follow, and ``without_graph``.
    """

    def __init__(self, by_network: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.by_network = {who: dict(own) for who, own in (by_network or {}).items()}

    def count(self, who: str, rows: int, *, graph: bool) -> None:
        """Counts one call of so many samples."""
        own = self.by_network.setdefault(who, {WITH: 0, WITHOUT: 0})
        own[WITH if graph else WITHOUT] += rows

    def add(self, other: Passes, times: int = 1, who: str | None = None) -> None:
        """Adds another sum so many times; all of it as ``who``, where that is given."""
        for name, own in other.by_network.items():
            self.count(who or name, times * own[WITH], graph=True)
            self.count(who or name, times * own[WITHOUT], graph=False)

    @property
    def total(self) -> int:
        """Of all networks."""
        return sum(sum(own.values()) for own in self.by_network.values())


class Counter:
    """Where the networks of one run tell of their calls. Counted are those inside :meth:`counting` alone: pictures that
    are drawn on the way are no part of a run's cost."""

    def __init__(self) -> None:
        self._into: Passes | None = None

    @contextmanager
    def counting(self, into: Passes) -> Iterator[None]:
        """Calls inside the ``with`` are counted."""
        before, self._into = self._into, into
        try:
            yield
        finally:
            self._into = before

    def count(self, who: str, rows: int, *, graph: bool) -> None:
        """Tells of one call of so many samples."""
        if self._into is not None:
            self._into.count(who, rows, graph=graph)
