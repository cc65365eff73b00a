"""What is in memory while code runs on fake tensors: every storage from its first operator to its end, and the floating
point operations meanwhile.

An own mode and not torch's tracker (torch.distributed._tools.mem_tracker): that one hooks optimisers and modules and
knows one network, where a method has several that share weights and take turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OTHER = "activations"
"""The kind of what nobody marked: results and graphs, and what operators need meanwhile."""


@dataclass(frozen=True)
class Peak:
    """The moment at which most was held.

    Attributes:
        total: bytes.
        by_kind: of them, by what they are.
    """

    total: int
    by_kind: dict[str, int]


class LiveBytes(TorchDispatchMode):
    """Inside the ``with`` storages that operators make are counted; those from before by :meth:`mark` alone.

    Args:
        unit: an allocator hands out multiples of so many bytes: 512 on CUDA, 64 on a CPU.

    Attributes:
        flops: floating point operations so far; a multiplication and an addition are two.
    """

    def __init__(self, unit: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit, self.flops = unit, 0
        self._events: list[tuple[int, int]] = []  # the storage's number and the change in bytes
        self._number: dict[
            int, int
        ] = {}  # of storages, by their address, which is theirs while we look at them
        self._weak: dict[int, StorageWeakRef] = {}
        self._lasting: set[int] = set()  # addresses of those that are looked after at places alone
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # of what counts, by number
        self._count = self._total = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def mark(self, values: Iterable[Tensor], kind: str, *, lasting: bool = False) -> None:
        """Says what tensors are, and counts those that are from before; ``lasting`` ones stay for a while."""
        for value in values:
            self._kinds[self._see(value)] = kind
            if lasting:
                self._lasting.add(value.untyped_storage()._cdata)

    def mark_network(self, net: nn.Module, kind: str) -> None:
        """The same of all that a network holds and nobody marked."""
        for value in (*net.parameters(), *net.buffers()):
            self._kinds.setdefault(self._see(value), kind)
            self._lasting.add(value.untyped_storage()._cdata)

    def _see(self, value: Tensor) -> int:
        storage: Any = value.untyped_storage()
        key = storage._cdata
        if (number := self._number.get(key)) is not None:
            return number
        number = self._count
        self._count += 1
        size = -(-storage.nbytes() // self.unit) * self.unit
        # What ended meanwhile is looked for where it matters: before a new height, and now and then.
        if self._total + size > self._most or number % 64 == 0:
            self._sweep(self._weak.keys() - self._lasting)
        self._number[key], self._weak[key], self._sizes[number] = number, StorageWeakRef(storage), size
        self._change(number, size)
        return number

    def _change(self, number: int, size: int) -> None:
        self._events.append((number, size))
        self._total += size
        self._most = max(self._most, self._total)

    def _sweep(self, keys: Iterable[int]) -> None:
        """Counts those no more that have ended."""
        for key in [key for key in keys if self._weak[key].expired()]:
            del self._weak[key]
            self._lasting.discard(key)
            if size := self._sizes.pop(self._number[key], 0):
                self._change(self._number[key], -size)
            del self._number[key]

    def release(self, values: Iterable[Tensor]) -> None:
        """Counts tensors no more from here on: they are elsewhere."""
        for value in values:
            number = self._see(value)
            if size := self._sizes.pop(number, 0):
                self._change(number, -size)

    def place(self) -> int:
        """A place among what happened, for :meth:`peak`."""
        self._sweep(list(self._weak))
        self._most = self._total
        return len(self._events)

    def resized(self, storage: Any) -> None:
        """Counts a storage anew, whose size was changed."""
        number = self._number.get(storage._cdata)
        if number is not None and number in self._sizes:
            size = -(-storage.nbytes() // self.unit) * self.unit
            self._change(number, size - self._sizes[number])
            self._sizes[number] = size

    def held(self, scale: Mapping[str, float] | None = None) -> dict[str, int]:
        """Bytes held now, by kind; ``scale`` as in :meth:`peak`."""
        self._sweep(list(self._weak))
        sizes: Counter[str] = Counter()
        for number, change in self._events:
            sizes[self._kinds.get(number, OTHER)] += change
        return {kind: int(size * (scale or {}).get(kind, 1.0)) for kind, size in sizes.items() if size}

    def peak(self, since: int = 0, scale: Mapping[str, float] | None = None) -> Peak:
        """The most that was held since a place.

        Args:
            since: the place.
            scale: the share that counts, by kind; all of those it does not name.
        """
        scale, most, total = scale or {}, -1.0, 0.0
        sizes: Counter[str] = Counter()
        found: dict[str, int] = {}
        for place, (number, change) in enumerate(self._events):
            kind = self._kinds.get(number, OTHER)
            own = change * scale.get(kind, 1.0)
            sizes[kind] += own  # type: ignore[assignment]
            total += own
            if total > most and (place >= since - 1):
                most, found = total, dict(sizes)
        return Peak(int(max(most, 0)), {kind: int(size) for kind, size in found.items() if int(size)})
