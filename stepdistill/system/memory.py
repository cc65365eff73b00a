"""Memory: freed blocks kept between steps, copies to a device, and the most that was held."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys

import torch
from torch import Tensor

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


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. What goes from the processor to a GPU is pinned first: nothing then waits for its copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
