"""Full float32: on NVIDIA GPUs PyTorch lets convolutions round their inputs to 10 bits (TF32) unless told otherwise.

That moves features by 1e-3, so that a score depends on the device, and a student's pictures by several 255ths, so that
they are not those that are drawn elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and matrix products without TF32 inside; the caller's settings come back."""
    backends: Any = torch.backends  # whose modules are made at run time, unseen by type checkers
    convolution, product = backends.cudnn.conv, backends.cuda.matmul
    before = convolution.fp32_precision, product.fp32_precision
    convolution.fp32_precision = product.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision, product.fp32_precision = before
