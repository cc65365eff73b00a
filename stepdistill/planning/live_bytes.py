"""What is in memory while code runs on fake tensors: every storage from its first operator to its end, and the floating
point operations meanwhile.

An own mode and not torch's tracker (torch.distributed._tools.mem_tracker): that one hooks optimisers and modules and
knows one network, where a method has several that share weights and take turns.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

DEVICE = torch.ops.prim.device.default
"""Asked of a fake tensor at every turn of torch's own code."""

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

    def beside(self, kind: str, size: int) -> Peak:
        """The same with so many bytes of a kind more."""
        return Peak(self.total + size, {**self.by_kind, kind: size}) if size else self


class _End(weakref.ref[torch.UntypedStorage]):
    """Of a storage: tells when it ends."""

    key: int


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
        self._number: dict[int, int] = {}  # of storages, by their address, which is theirs until they end
        self._ends: dict[int, _End] = {}
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # of what counts, by number
        self._count = 0
        self._before: dict[int, int] = {}  # sizes at the start, and the changes since
        self._events: list[tuple[int, int]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper takes longer than an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._see_all(out)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _see_all(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, (list, tuple)):
            for value in out:
                self._see_all(value)

    def mark(self, values: Iterable[Tensor], kind: str) -> None:
        """Says what tensors are, and counts those that are from before."""
        for value in values:
            self._kinds[self._see(value)] = kind

    def mark_network(self, net: nn.Module, kind: str) -> None:
        """The same of all that a network holds and nobody marked."""
        for value in (*net.parameters(), *net.buffers()):
            self._kinds.setdefault(self._see(value), kind)

    def _see(self, value: Tensor) -> int:
        storage: Any = value.untyped_storage()
        key = storage._cdata
        if (number := self._number.get(key)) is not None:
            return number
        number = self._count
        self._count += 1
        end = _End(storage, self._ended)
        end.key = key
        self._number[key], self._ends[key] = number, end
        self._sizes[number] = size = self._bytes(storage)
        self._events.append((number, size))
        return number

    def _bytes(self, storage: Any) -> int:
        return -(-int(storage.nbytes()) // self.unit) * self.unit

    def _ended(self, end: Any) -> None:
        del self._ends[end.key]
        self._leave(self._number.pop(end.key))

    def _leave(self, number: int) -> None:
        if size := self._sizes.pop(number, 0):
            self._events.append((number, -size))

    def release(self, values: Iterable[Tensor]) -> None:
        """Counts tensors no more from here on: they are elsewhere."""
        for value in values:
            self._leave(self._see(value))

    def resized(self, storage: Any) -> None:
        """Counts a storage anew, whose size was changed."""
        number = self._number.get(storage._cdata)
        if number is not None and number in self._sizes:
            size = self._bytes(storage)
            self._events.append((number, size - self._sizes[number]))
            self._sizes[number] = size

    def begin(self) -> None:
        """:meth:`peak` looks from here on."""
        self._before = dict(self._sizes)
        self._events.clear()

    def held(self, scale: Mapping[str, float] | None = None) -> dict[str, int]:
        """Bytes held now, by kind; ``scale`` as in :meth:`peak`."""
        sizes: Counter[str] = Counter()
        for number, size in self._sizes.items():
            sizes[self._kinds.get(number, OTHER)] += size
        return {kind: int(size * (scale or {}).get(kind, 1.0)) for kind, size in sizes.items() if size}

    def peak(self, scale: Mapping[str, float] | None = None) -> Peak:
        """The most that was held since :meth:`begin`.

        Args:
            scale: the share that counts, by kind; all of those it does not name.
        """
        kinds, shares = self._kinds, scale or {}
        own = [(kinds.get(number, OTHER), change) for number, change in self._events]
        sizes: dict[str, float] = {}
        for number, size in self._before.items():
            kind = kinds.get(number, OTHER)
            sizes[kind] = sizes.get(kind, 0.0) + size * shares.get(kind, 1.0)
        total = most = sum(sizes.values())
        place = 0
        for after, (kind, change) in enumerate(own, 1):
            total += change * shares.get(kind, 1.0)
            if total > most:
                most, place = total, after
        for kind, change in own[:place]:
            sizes[kind] = sizes.get(kind, 0.0) + change * shares.get(kind, 1.0)
        return Peak(int(most), {kind: int(size) for kind, size in sizes.items() if int(size)})
