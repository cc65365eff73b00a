"""Rows of named tensors in safetensors files of one folder, each row with a checksum, read by memory map.

A file is written whole, so that work that was killed goes on at the first file that is missing. One that is damaged is
named, and made again only where that is asked for (``data.damaged=remake``).
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.system.files import written_whole
from stepdistill.system.log import say
from stepdistill.system.parsing import parse_json
from stepdistill.system.processes import ALONE, Processes

_CHECKSUMS = "crc32 of "
Tensors = Mapping[str, Tensor]

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Place(NamedTuple):
    """A tensor of a file: where it begins there, in bytes."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class DamagedShard(UserError):
    """A file is not what was written.

    Args:
        file: which.
        problem: what is wrong with it.
    """

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"{file} is damaged ({problem}): set data.damaged=remake, and it is made again")
        self.problem = problem


class Shards:
    """The files of a folder.

    Args:
        folder: made when missing.
        stem: what their names begin with.
        remake: whether damaged files are made again.
    """

    def __init__(self, folder: Path, stem: str, remake: bool = False) -> None:
        self.folder, self._stem, self._remake = folder, stem, remake
        self._layouts: dict[int, dict[str, _Place]] = {}
        self._proven: dict[tuple[int, str], bytearray] = {}

    def file(self, number: int) -> Path:
        """The place of a file."""
        return self.folder / f"{self._stem}-{number:05d}.safetensors"

    def there(self, numbers: Iterable[int]) -> int:
        """How many of the files are there."""
        return sum(self.file(number).is_file() for number in numbers)

    def missing(self, numbers: Iterable[int], processes: Processes = ALONE) -> list[int]:
        """The files that this process has to make: its own share of the numbers, without those that are there.

        Each is opened, and the checksums of all its rows are compared where it was written or altered since they last
        were; of the others, rows are checked when they are first read.

        Raises:
            UserError: one is damaged, and not to be made again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / f".{self._stem}-checked-{processes.rank}-of-{processes.count}"
        own = [number for number in numbers if number % processes.count == processes.rank]
        known, found = _lines(note), list[int]()
        seen = sorted(line for line in known if line.partition(" ")[0] not in set(map(str, own)))
        for number in own:
            file = self.file(number)
            if not file.is_file():
                found.append(number)
                continue
            state = file.stat()
            stamp = (
                f"{number} {state.st_size} {state.st_mtime_ns}"  # another one, earlier or later: another file
            )
            if (problem := self._problem(number, whole=stamp not in known)) is not None:
                if not self._remake:
                    raise DamagedShard(file, problem)
                say(f"{file} is damaged ({problem}) and made again")
                file.unlink()
                found.append(number)
            else:
                seen.append(stamp)
        note.write_text("\n".join(seen), encoding="utf-8")
        return found

    def write(self, number: int, tensors: Tensors, notes: Mapping[str, str] | None = None) -> None:
        """Writes a file of tensors whose first axis counts rows, with notes in its header."""
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        sums = {_CHECKSUMS + name: torch.tensor(list(map(_crc32, value))) for name, value in plain.items()}
        with written_whole(self.file(number)) as temporary:
            save_file({**plain, **sums}, temporary, dict(notes or {}))

    def rows(self, number: int, name: str, index: Sequence[int]) -> Tensor:
        """Rows of a tensor of a file, copied out of it.

        Raises:
            DamagedShard: one of them is not what was written.
        """
        places, file, which = self._layout(number), self.file(number), list(index)
        place, summed = places[name], places.get(_CHECKSUMS + name)  # caches of older versions have no sums
        with self._opened(number) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            found = _rows(mapped, place, which)
            sums = None if summed is None else _rows(mapped, summed, which).view(np.int64)[:, 0]
        if sums is not None:
            proven = self._proven.setdefault((number, name), bytearray(place.shape[0]))
            for row, content, wanted in zip(which, found, sums.tolist(), strict=True):
                if not proven[row] and zlib.crc32(content.data) != wanted:
                    raise DamagedShard(file, f"row {row} of {name} is not what was written")
                proven[row] = True
        plain = torch.from_numpy(found).reshape(-1)
        return plain.view(place.dtype).reshape(len(which), *place.shape[1:])

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a file's tensors."""
        places = self._layout(number).items()
        return {name: place.shape for name, place in places if not name.startswith(_CHECKSUMS)}

    def notes(self, number: int) -> dict[str, str]:
        """What was noted in a file's header."""
        with safe_open(self.file(number), "pt") as opened:
            return dict(opened.metadata() or {})

    def _opened(self, number: int) -> BinaryIO:
        try:
            return self.file(number).open("rb")
        except OSError as error:
            raise DamagedShard(self.file(number), str(error)) from None

    def _layout(self, number: int) -> dict[str, _Place]:
        """Where the tensors of a file lie, as its header says."""
        if number not in self._layouts:
            try:
                with safe_open(self.file(number), "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            except (
                SafetensorError,
                OSError,
                ValueError,
                KeyError,
                AttributeError,
            ) as error:  # of types it lacks
                raise DamagedShard(self.file(number), str(error)) from None
            with self._opened(number) as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = parse_json(stream.read(length))
            self._layouts[number] = {
                name: _Place(8 + length + header[name]["data_offsets"][0], tuple(value.shape), value.dtype)
                for name, value in tensors.items()
            }
        return self._layouts[number]

    def _problem(self, number: int, *, whole: bool) -> str | None:
        try:
            for name, shape in self.shapes(number).items() if whole else ():
                for first in range(0, shape[0], 64):
                    self.rows(number, name, range(first, min(first + 64, shape[0])))
            self._layout(number)
        except DamagedShard as error:
            self._layouts.pop(number, None)
            return error.problem
        return None


def _rows(mapped: mmap.mmap, place: _Place, index: list[int]) -> NDArray[np.uint8]:
    """The bytes [B, row] of rows of a tensor, copied."""
    every = np.frombuffer(mapped, np.uint8, place.shape[0] * place.row, place.start)
    return np.ascontiguousarray(every.reshape(place.shape[0], place.row)[index])


def _crc32(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _lines(file: Path) -> set[str]:
    try:
        return set(file.read_text(encoding="utf-8", errors="replace").split("\n"))
    except OSError:
        return set()


def grouped(shard: Sequence[int]) -> dict[int, list[int]]:
    """The places at which each number of a file stands."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(shard):
        found.setdefault(number, []).append(place)
    return found
