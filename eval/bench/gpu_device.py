"""What the parts of gpu.py share: the device, the form of a row, and the lock under which they time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
Row = dict[str, Any]

PEAK_FLOPS = 989e12
"""Of an H100 or H200 in bf16, dense, as its data sheet has it."""


@contextmanager
def alone() -> Iterator[None]:
    """No other part times anything on the GPU meanwhile."""
    with open(os.environ.get("GPU_LOCK", os.devnull), "w") as lock:
        if "GPU_LOCK" in os.environ:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
