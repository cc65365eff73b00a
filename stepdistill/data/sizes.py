"""How large a cache becomes, said before anything of it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.system.files import check_room, present, size_text

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
"""What pairs may be kept in, by its name in ``data.pairs_dtype``."""


@dataclass(frozen=True)
class CacheSize:
    """The size of a cache.

    Attributes:
        what: it holds.
        count: its rows.
        row: bytes of one, without names and checksums, which are some hundred bytes a row at most.
    """

    what: str
    count: int
    row: int

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.count * self.row

    def line(self, folder: Path) -> str:
        """For the log: ``pairs: 20,000 x 160.0 KiB = 3.1 GiB in FOLDER``."""
        return f"{self.what}: {self.count:,} x {size_text(self.row)} = {size_text(self.bytes)} in {folder}"


@dataclass(frozen=True)
class Wanted:
    """A cache that is to be made, or to be gone on with.

    Attributes:
        size: of all of it.
        folder: where.
        there: rows that are there already.
    """

    size: CacheSize
    folder: Path
    there: int

    @property
    def bytes(self) -> int:
        """Still to be written."""
        return (self.size.count - self.there) * self.size.row


def check_rooms(wanted: Iterable[Wanted | None], say: Callable[[str], None] = lambda line: None) -> None:
    """Says the size of every cache of which something is missing; their disks have room for all together.

    Raises:
        UserError: one has not.
    """
    disks: dict[int, list[Wanted]] = {}
    for each in wanted:
        if each is not None and each.bytes:
            say(each.size.line(each.folder))
            disks.setdefault(present(each.folder).stat().st_dev, []).append(each)
    for some in disks.values():
        told = " and ".join(f"{each.size.what} ({size_text(each.bytes)})" for each in some)
        check_room(some[0].folder, sum(each.bytes for each in some), told)


def rows_size(what: str, count: int, example: Mapping[str, Tensor]) -> CacheSize:
    """Of ``count`` rows like those of named tensors [B, ...], which may lie on the meta device: prompts by what a codec
    makes of some."""
    made = max((len(value) for value in example.values()), default=1)
    every = sum(value.numel() * value.element_size() for value in example.values())
    return CacheSize(what, count, -(-every // made))


def latents_size(count: int, state: Sequence[int]) -> CacheSize:
    """Of the latents of so many images, of states of this shape, without B."""
    return CacheSize("latents", count, 4 * math.prod(state))


def pairs_size(count: int, state: Sequence[int], states: int = 0, dtype: str = "float32") -> CacheSize:
    """Of so many pairs.

    Args:
        count: of pairs.
        state: the shape of one, without B.
        states: of each trajectory that are kept beside its clean end.
        dtype: one of DTYPES.
    """
    return CacheSize("pairs", count, (1 + states) * math.prod(state) * DTYPES[dtype].itemsize)
