"""Files: written whole or not at all, their SHA-256, whether one can be written, said before anything slow, and one
that every process opens for itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from stepdistill.errors import UserError
from stepdistill.system.processes import ALONE, Processes

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A file that every process opens for itself, as a position in it is one process's.

    Args:
        opened: opens it; picklable.
    """

    def __init__(self, opened: Callable[[], T]) -> None:
        self._opened = opened
        self._held: dict[int, T] = {}  # by process

    def __call__(self) -> T:
        """The one that is open, the same for all threads: of two that open at once, one is taken by both."""
        process = os.getpid()
        held = self._held.get(process)
        return self._held.setdefault(process, self._opened()) if held is None else held

    def __getstate__(self) -> dict[str, object]:
        return {"_opened": self._opened, "_held": {}}


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def give_usual_modes(place: Path) -> None:
    """Gives a file, or a folder and all in it, the modes that the umask gives to new ones: safetensors and temporary
    folders are for their owner alone. What is a hard link to another file, or nobody's to change, stays as it is."""
    mask = _umask()
    for path in (place, *place.rglob("*")):
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode):
            path.chmod(found.st_mode & stat.S_ISGID | 0o777 & ~mask)
        elif stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            path.chmod(0o666 & ~mask)


def readable_as_usual(file: Path) -> bool:
    """Whether all those may read a file who may read a new one."""
    usual = 0o444 & ~_umask()
    return file.stat().st_mode & usual == usual


def _umask() -> int:
    mask = os.umask(0o022)  # it is read by being set
    os.umask(mask)
    return mask


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A file beside ``file`` to write to, which takes its place when the block ends: a reader, or a process that is
    killed, never sees half of it. Each process has its own: those of two containers may have one number. Where the
    block fails nothing is left."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        give_usual_modes(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def folder_written_whole(folder: Path, writers: Processes = ALONE) -> Iterator[Path]:
    """The same for a folder: an empty one beside it, which takes its place, and that of one that was there. Several
    writers enter and leave it together; where the block fails in one it fails in all.

    Raises:
        OtherProcessError: it failed in another process.
    """
    temporary = folder.with_name(f".{folder.name}.part")

    def make() -> None:
        if writers.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def take_place() -> None:
        if writers.main:
            give_usual_modes(temporary)
            for file in temporary.rglob("*"):
                on_disk(file)
            put_in_place(temporary, folder)
            on_disk(folder.parent)

    try:
        writers.together(make)
        yield temporary
        writers.together(take_place)
    except BaseException:
        if writers.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def put_in_place(new: Path, folder: Path) -> None:
    """Gives a folder the name of another, which is removed: whoever looks finds one of the two, and all of it. Where
    the system cannot exchange names there is a moment in which neither is there."""
    if folder.exists():
        try:
            _exchange(new, folder)
        except OSError:  # a system or a file system (NFS) without it
            aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(aside)
            new.rename(folder)
            new = aside
        shutil.rmtree(new, ignore_errors=True)
    else:
        new.rename(folder)


def _exchange(one: Path, other: Path) -> None:
    """Exchanges the names of two folders in one step: renameat2 of Linux."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def remove_folder(folder: Path) -> None:
    """Removes a folder that others read: it is there with all that is in it, or not at all."""
    leaving = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def remove_left_over(folder: Path) -> None:
    """Removes what processes that were killed have left half written or half removed in a folder; for whoever alone
    writes there."""
    for pattern in (".*.part", ".*.[0-9]*.old"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a power cut."""
    with contextlib.suppress(OSError):  # some file systems cannot be asked
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def check_writable(folder: Path) -> None:
    """The folder can be written to; it is made when it is missing.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.part"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; give another --output"
        ) from None


def check_folder(folder: Path) -> None:
    """As :func:`check_writable`, and leaves the disk as it was.

    Raises:
        UserError: it cannot be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        check_writable(folder)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # another run may be in it by now
                place.rmdir()


def check_room(folder: Path, wanted: int, what: str) -> None:
    """The disk of a folder, which need not be there yet, has room for so many bytes more.

    Raises:
        UserError: it has not.
    """
    if (free := shutil.disk_usage(present(folder)).free) < wanted:
        raise UserError(
            f"{what} need {size_text(wanted)} in {folder}, whose disk has {size_text(free)} free: make room, or name "
            "another place (data.pairs; $STEPDISTILL_CACHE for prompts and latents)"
        )


def present(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def size_text(size: int) -> str:
    """So many bytes, in the unit that fits."""
    unit = max(0, min(3, (max(size, 1).bit_length() - 1) // 10))
    return f"{size / 1024**unit:.{1 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}


def disk_error(error: BaseException) -> str | None:
    """What to tell a user of an error that is the disk's and not the program's; None of any other. Some come from
    libraries that say of it no more than its number."""
    number = error.errno if isinstance(error, OSError) else None
    if (found := re.search(r"\(os error (\d+)\)", str(error))) is not None:
        number = int(found[1])
    if number not in _OF_DISKS:
        return None
    where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return (
        f"{os.strerror(number)}: the disk could not be written{where}; what was finished before is kept: make room, or "
        "name another place, and start the same command again (train: with --resume, if it had a checkpoint)"
    )


def check_file(path: Path) -> None:
    """A file that is written after minutes of work can be written.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} is not there or cannot be written")
