"""Tar archives that anyone may have made: read where they lie, and only as far as a file of their size can go."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from pathlib import Path
from typing import IO, Any, cast

from stepdistill.errors import UserError

RATIO = 100
"""Times its own size that an archive of images and captions may unpack to, beyond FREE. Images hardly shrink, and texts
to a tenth."""
FREE = 1 << 30
LONGEST_HEADER = 1 << 20
"""Bytes of a header of a name or of notes, which is held whole; tar itself writes some hundred."""
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


def most_unpacked(file: Path) -> int:
    """Bytes that an archive may claim to hold."""
    return FREE + RATIO * file.stat().st_size


def open_tar(file: Path) -> tarfile.TarFile:
    """A tar, compressed or not, to be read.

    Raises:
        UserError: it unpacks to far more than it is; also later, while it is read.
    """
    with file.open("rb") as stream:
        opened: Any = _COMPRESSED.get(stream.read(2), open)
    return tarfile.open(
        fileobj=cast("IO[bytes]", _Bounded(opened(file, "rb"), file)), mode="r:", tarinfo=_Member
    )


class _Bounded:
    """A file to read, up to a place that no honest one reaches."""

    def __init__(self, stream: IO[bytes], file: Path) -> None:
        self._stream, self._file, self._most = stream, file, most_unpacked(file)
        self._place = 0  # asking a compressed file costs as much as reading it

    def read(self, size: int = -1) -> bytes:
        self._reach(self._place + max(size, 0))
        content = self._stream.read(size if size >= 0 else self._most)
        self._place += len(content)
        return content

    def seek(self, place: int, whence: int = 0) -> int:
        if whence == 0:
            self._reach(place)
        self._place = self._stream.seek(place, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        self._stream.close()

    def _reach(self, place: int) -> None:
        if place > self._most:
            raise UserError(
                f"{self._file} unpacks to more than {self._most} bytes, and is {self._file.stat().st_size} long: "
                "unpack it yourself where it is right, and give the folder"
            )


class _Member(tarfile.TarInfo):
    """Headers that say the next member's name or notes on it are read whole, so they have a bound."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes; {LONGEST_HEADER} are allowed")
        try:
            return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]
        except (ValueError, IndexError) as error:  # of numbers that are none
            if isinstance(error, UserError):
                raise
            raise tarfile.ReadError(f"a header that cannot be read ({error})") from None


_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
