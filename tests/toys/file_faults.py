"""Every call with which a piece of work changes files: it is killed at each, or the disk is full or read-only there.

The work runs in a fork of this process. An audit hook of Python sees each call before it is made; what safetensors
writes, whose own calls no hook sees, counts as two: one before the file is there and one after.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from safetensors import SafetensorError

Fault = Literal["killed", "torn", "full", "read-only"]
"""``torn``: killed, and of the file that was last opened for writing only half is there."""

FAULTS: tuple[Fault, ...] = ("killed", "torn", "full", "read-only")
_NUMBERS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}

_FOLDERS = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2, "os.rename": 2}
"""Which of a call's arguments is the open folder that its path starts from, or -1."""


class _Watch:
    """Counts the calls under a folder, and lets one of them go wrong.

    Args:
        root: the folder.
        at: number of the call, from 0; None lets all be.
        fault: what happens to it.
    """

    def __init__(self, root: Path, at: int | None, fault: Fault) -> None:
        self._root, self._at, self._fault = os.fspath(root.resolve()), at, fault
        self.calls: list[str] = []
        self._opened: str | None = None
        self._inside = False

    def start(self) -> None:
        """From here on, for as long as the process lives."""
        plain = safetensors.torch.serialize_file

        def serialize(tensors: Any, file: Any, metadata: Any = None) -> None:
            self.seen("safetensors", os.fspath(file))
            plain(tensors, file, metadata)
            self._opened = os.fspath(file)
            self.seen("safetensors, written", os.fspath(file))

        safetensors.torch.serialize_file = serialize
        sys.addaudithook(self._audited)

    def seen(self, call: str, path: Any) -> None:
        """One of the calls."""
        try:
            name = os.fsdecode(path)
        except TypeError:  # a number of an open file
            return
        if self._inside or not os.path.abspath(name).startswith(self._root):
            return
        self.calls.append(f"{call} {name}")
        if self._at != len(self.calls) - 1:
            return
        if self._fault in _NUMBERS:
            number = _NUMBERS[self._fault]
            if call.startswith("safetensors"):
                raise SafetensorError(
                    f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
                )
            raise OSError(number, os.strerror(number), name)
        self._inside = True
        if self._fault == "torn" and self._opened is not None and os.path.isfile(self._opened):
            os.truncate(self._opened, os.path.getsize(self._opened) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen("open", path)
                if not isinstance(path, int):
                    self._opened = os.fsdecode(path)
        elif event in _CHANGES:
            path, folder = arguments[0], arguments[_FOLDERS.get(event, 0)]
            within = isinstance(folder, int) and folder >= 0 and not isinstance(path, int)
            self.seen(event, os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if within else path)


def calls_of(work: Callable[[], object], root: Path) -> list[str]:
    """The calls of a piece of work that nothing goes wrong with, in order."""
    error, calls = _forked(work, root, None, "killed")
    assert error is None, error
    return calls


def faulty(work: Callable[[], object], root: Path, at: int, fault: Fault) -> BaseException | None:
    """Does the work with a fault at a call; what it raised, if it lived and raised something.

    Args:
        work: changes files under ``root``.
        root: the folder.
        at: number of the call, from 0.
        fault: what happens there.
    """
    return _forked(work, root, at, fault)[0]


def points(count: int, most: int) -> Iterator[int]:
    """At most so many of the numbers below ``count``, spread over all, the first and the last among them."""
    chosen = min(count, most)
    yield from sorted({round(i * (count - 1) / max(chosen - 1, 1)) for i in range(chosen)})


def _forked(
    work: Callable[[], object], root: Path, at: int | None, fault: Fault
) -> tuple[BaseException | None, list[str]]:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads
        child = os.fork()
    if not child:
        os.close(reader)
        watch, error = _Watch(root, at, fault), None
        try:
            watch.start()
            work()
        except BaseException as raised:
            error = raised
            raised.add_note("".join(traceback.format_exception(raised)))
        watch._inside = True
        with os.fdopen(writer, "wb") as stream:
            try:
                pickle.dump((error, watch.calls), stream)
            except Exception:
                pickle.dump((RuntimeError(repr(error)), watch.calls), stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if at is not None and fault in ("killed", "torn"):
        assert status in (-signal.SIGKILL, 0), status  # 0: the work had no such call
    error, calls = pickle.loads(said) if said else (None, [])
    return error, calls
