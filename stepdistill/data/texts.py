"""Texts that are read where they lie: a million prompts are an index of places in a file, not a million strings."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, overload

from stepdistill.errors import UserError
from stepdistill.pictures.given import identity
from stepdistill.system.files import PerProcess


class Texts(Sequence[str]):
    """Texts of a file, or of one block of bytes: of each its place is held, 12 bytes, and nothing else.

    Args:
        content: the file, or the bytes.
        parse: the bytes of a place -> its text.
    """

    def __init__(self, content: Path | bytearray, parse: Callable[[bytes], str]) -> None:
        self._content, self._parse = content, parse
        self._starts, self._sizes = array("Q"), array("I")
        if isinstance(content, Path):
            self._open: PerProcess[BinaryIO] = PerProcess(partial(opened, content))
            self._stamp = _stamp(content.stat())

    @staticmethod
    def of(texts: Iterable[str]) -> Texts:
        """Texts in one block of bytes."""
        block = bytearray()
        found = Texts(block, _as_written)
        for text in texts:
            content = text.encode("utf-8", "surrogatepass")
            found.add(len(block), len(content))
            block += content
        return found

    def add(self, start: int, size: int) -> None:
        """One more text, at a place of the content."""
        self._starts.append(start)
        self._sizes.append(size)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A text, or a list of some.

        Raises:
            UserError: the file was altered since it was looked through.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, size = self._starts[index], self._sizes[index]
        if isinstance(self._content, Path):
            return self._parse(os.pread(self._unaltered(self._open()).fileno(), size, start))
        return self._parse(bytes(self._content[start : start + size]))

    def __iter__(self) -> Iterator[str]:
        if isinstance(self._content, Path):
            with self._content.open("rb") as stream:
                self._unaltered(stream)
                for start, size in zip(self._starts, self._sizes, strict=True):
                    stream.seek(start)
                    yield self._parse(stream.read(size))
        else:
            yield from (self[i] for i in range(len(self)))

    def _unaltered(self, stream: BinaryIO) -> BinaryIO:
        if _stamp(os.fstat(stream.fileno())) != self._stamp:
            raise UserError(f"{self._content} was altered while it was in use: start again")
        return stream


def opened(file: Path) -> BinaryIO:
    """A file, to read bytes from."""
    return file.open("rb")


def _as_written(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _stamp(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


def rows_sha256(rows: Iterable[object]) -> str:
    """SHA-256 of the rows as one JSON list, none of them held; of a picture that a prompt names its content counts, not
    its place."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        known = identity(row) if isinstance(row, str) else row
        digest.update((", " if number else "").encode() + json.dumps(known).encode())
    digest.update(b"]")
    return digest.hexdigest()


def lines_sha256(texts: Iterable[str]) -> str:
    """SHA-256 of the texts, one a line."""
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        digest.update(("\n" if number else "").encode() + text.encode())
    return digest.hexdigest()
