"""The draws of Philox4x32-10 (see ``philox_numpy``), each one operator of torch for profilers and compilers:
``stepdistill::normal``, ``stepdistill::uniform`` and ``stepdistill::integers``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.diffusion import philox_numpy

NAME = "philox4x32-10"
"""Of the numbers: what was begun with others does not go on with these."""


@cache
def _drawn_by(device: torch.device) -> Any:
    """Who draws for a device: Triton on it, or else the processor, which sends what it drew."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from stepdistill.diffusion import philox_triton

        return philox_triton
    return philox_numpy


@torch.library.custom_op("stepdistill::normal", mutates_args=())
def normal(
    key: int, step: int, first: int, samples: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Standard normal numbers, float32 of a shape [B, ...].

    Args:
        key: of 64 bits, signed.
        step: word 2 of the counter.
        first: the sample of the first row; the others follow.
        samples: [B] int64, the sample of each row, in place of ``first``.
        shape: of the result.
        device: where it lies, and is drawn where it can be.
    """
    drawn: Tensor = _drawn_by(device).normal(key, step, first, samples, shape, device)
    return drawn


@torch.library.custom_op("stepdistill::uniform", mutates_args=())
def uniform(
    key: int, step: int, first: int, count: int, low: float, high: float, device: torch.device
) -> Tensor:
    """Uniform numbers in [low, high), float32 of shape [count], for the samples from ``first`` on."""
    if not low <= high:
        raise ValueError(
            f"uniform numbers are drawn from a lower to an upper bound, not from {low} to {high}"
        )
    # The bounds as float32 has them, and the last number below the upper one, which rounding could reach.
    least, end = np.float32(low), np.float32(high)
    bounds = (float(least), float(end), float(np.nextafter(end, least)))
    drawn: Tensor = _drawn_by(device).uniform(key, step, first, count, *bounds, device)
    return drawn


@torch.library.custom_op("stepdistill::integers", mutates_args=())
def integers(key: int, step: int, first: int, count: int, high: int, device: torch.device) -> Tensor:
    """Integers in 0 .. high - 1, int64 of shape [count], for the samples from ``first`` on."""
    drawn: Tensor = _drawn_by(device).integers(key, step, first, count, _bound(high), device)
    return drawn


@normal.register_fake
def _(
    key: int, step: int, first: int, samples: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    return torch.empty(shape, device=device)


@uniform.register_fake
def _(key: int, step: int, first: int, count: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(count, device=device)


@integers.register_fake
def _(key: int, step: int, first: int, count: int, high: int, device: torch.device) -> Tensor:
    return torch.empty(count, device=device, dtype=torch.int64)


def shared_integer(key: int, step: int, high: int) -> int:
    """One integer in 0 .. high - 1 for all samples of a step, drawn on the processor."""
    return philox_numpy.shared_integer(key, step, _bound(high))


def _bound(high: int) -> int:
    if not 0 < high < 2**32:
        raise ValueError(f"an integer is drawn below a bound of 1 to 2^32 - 1, not below {high}")
    return high
