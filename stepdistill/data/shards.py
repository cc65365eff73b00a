"""Rows of named tensors in safetensors files of one folder, each row with a checksum, read by memory map.

A file is written whole, so that work that was killed goes on at the first file that is missing. One that is damaged is
named, and made again only where that is asked for (``data.damaged=remake``).
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.system.files import written_whole
from stepdistill.system.log import say
from stepdistill.system.processes import ALONE, Processes

OPEN_BYTES = 2**26
"""Of the files that are mapped into memory at once, where they are more than one."""

_CHECKSUMS = "crc32 of "
Tensors = Mapping[str, Tensor]


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
        self._open: dict[int, dict[str, Tensor]] = {}
        self._proven: dict[tuple[int, str], bytearray] = {}

    def file(self, number: int) -> Path:
        """The place of a file."""
        return self.folder / f"{self._stem}-{number:05d}.safetensors"

    def missing(self, numbers: Iterable[int], processes: Processes = ALONE) -> list[int]:
        """The files that this process has to make: its own share of the numbers, without those that are there.

        Each is opened, and the checksums of all its rows are compared where it was written or altered since they last
        were; of the others, rows are checked when they are first read.

        Raises:
            UserError: one is damaged, and not to be made again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        seen = self.folder / f".{self._stem}-checked-{processes.rank}-of-{processes.count}"
        since, began = seen.stat().st_mtime_ns if seen.exists() else 0, time.time_ns()
        found = []
        for number in numbers:
            if number % processes.count != processes.rank:
                continue
            file = self.file(number)
            if not file.is_file():
                found.append(number)
            elif (problem := self._problem(number, whole=file.stat().st_mtime_ns >= since)) is not None:
                if not self._remake:
                    raise DamagedShard(file, problem)
                say(f"{file} is damaged ({problem}) and made again")
                file.unlink()
                found.append(number)
        seen.touch()
        os.utime(seen, ns=(began, began))
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
        tensors = self._mapped(number)
        value, sums = tensors[name], tensors.get(_CHECKSUMS + name)
        if sums is not None:  # caches of older versions have none
            proven = self._proven.setdefault((number, name), bytearray(len(value)))
            for row in index:
                if not proven[row] and _crc32(value[row]) != int(sums[row]):
                    raise DamagedShard(self.file(number), f"row {row} of {name} is not what was written")
                proven[row] = True
        return value[list(index)]

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a file's tensors."""
        return {name: tuple(value.shape) for name, value in self._mapped(number).items() if _is_data(name)}

    def notes(self, number: int) -> dict[str, str]:
        """What was noted in a file's header."""
        with safe_open(self.file(number), "pt") as opened:
            return dict(opened.metadata() or {})

    def _mapped(self, number: int) -> dict[str, Tensor]:
        """The tensors of a file, which lie on the disk until they are touched."""
        tensors = self._open.pop(number, None)
        if tensors is None:
            try:
                with safe_open(self.file(number), "pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise DamagedShard(self.file(number), str(error)) from None
        self._open[number] = tensors  # the last one used stands last
        while len(self._open) > 1 and sum(map(_bytes, self._open.values())) > OPEN_BYTES:
            del self._open[next(iter(self._open))]
        return tensors

    def _problem(self, number: int, *, whole: bool) -> str | None:
        try:
            for name, shape in self.shapes(number).items():
                self.rows(number, name, range(shape[0] if whole else 0))
        except DamagedShard as error:
            return error.problem
        finally:
            self._open.pop(number, None)
        return None


def _is_data(name: str) -> bool:
    return not name.startswith(_CHECKSUMS)


def _bytes(tensors: Tensors) -> int:
    return sum(value.nbytes for value in tensors.values())


def _crc32(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def grouped(shard: Sequence[int]) -> dict[int, list[int]]:
    """The places at which each number of a file stands."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(shard):
        found.setdefault(number, []).append(place)
    return found
