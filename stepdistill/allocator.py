"""Keeps freed memory in the process, so that every step does not ask the system for it anew."""

from __future__ import annotations

import ctypes
import platform

# From malloc.h of glibc (the numbers are part of its interface).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to hand no freed block back to the system; True where that was possible.

    A step of training frees and allocates the same hundreds of megabytes of activations. By default each large block is
    mapped when it is allocated and unmapped when it is freed, and the system clears every page again: measured with
    ``eval/bench/step.py``, a tenth of a DMD unit on CPU. The process then holds its peak memory until it ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
