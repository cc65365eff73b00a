"""A folder is one process's at a time: a lock that the system takes back when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stepdistill.errors import UserError
from stepdistill.system.log import say, utc_now

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Inside it no other process that asks for the same file gets in, on this machine or on another that sees the
    folder. A process that is killed holds nothing, so nothing is ever left to be removed by hand.

    Args:
        file: is made, says who holds it, and is removed at the end.
        what: what is held, for the message.

    Raises:
        UserError: another process has it, naming its number and its machine.
    """
    stream = _taken(file, what)
    try:
        stream.truncate(0)
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": utc_now()}, stream)
        stream.flush()
        yield
    finally:
        file.unlink(missing_ok=True)  # before others can have it
        stream.close()


def _taken(file: Path, what: str) -> IO[str]:
    while True:
        stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            if fcntl is not None:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with stream:
                if error.errno in _HELD:
                    raise UserError(
                        f"{what} is used by another process ({_holder(stream)}): wait for it, stop it, or give another "
                        "--output"
                    ) from None
            say(
                f"{file.parent}: its file system has no locks ({error.strerror}), so nothing keeps a second run out"
            )
            return file.open("w")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()  # who held it has removed it in between


def _holder(stream: IO[str]) -> str:
    try:
        told = json.load(stream)
        return f"{told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just begun"
