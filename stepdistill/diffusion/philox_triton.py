"""The numbers of ``philox_numpy`` in Triton, one launch a draw: the same operations in the same order, the same bits.

The compiler is told to keep products and sums apart (``enable_fp_fusion``): a fused one is rounded once, not twice.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepdistill.diffusion import philox_numpy
from stepdistill.system.memory import sent

BLOCK = 256
"""Counters of one program."""

FACTOR_0, FACTOR_1 = (tl.constexpr(x) for x in philox_numpy.MULTIPLIERS)
STEP_0, STEP_1 = (tl.constexpr(x) for x in philox_numpy.INCREMENTS)
ROUNDS = tl.constexpr(philox_numpy.ROUNDS)
LOG_OF_2 = tl.constexpr(philox_numpy.LOG_OF_2)
LEAST_MANTISSA = tl.constexpr(philox_numpy.LEAST_MANTISSA)
EXPONENT = tl.constexpr(philox_numpy.EXPONENT)
NORMAL = tl.constexpr(philox_numpy.NORMAL)
UNIFORM = tl.constexpr(philox_numpy.UNIFORM)
INTEGERS = tl.constexpr(philox_numpy.INTEGERS)


@triton.jit
def _words(key, law, step, sample, block):
    """The four random words of each counter."""
    c0 = block.to(tl.uint32)
    c1 = sample.to(tl.uint32)
    c2 = (block * 0 + step).to(tl.uint32)
    c3 = (block * 0 + law).to(tl.uint32)
    k0 = key.to(tl.uint32)
    k1 = (key.to(tl.int64) >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(c0, tl.full(c0.shape, FACTOR_0, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, FACTOR_1, tl.uint32))
        low0 = c0 * FACTOR_0
        low1 = c2 * FACTOR_1
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + STEP_0
        k1 = k1 + STEP_1
    return c0, c1, c2, c3


@triton.jit
def _polynomial(z, C: tl.constexpr):
    value = z * C[len(C) - 1]
    for i in tl.static_range(len(C) - 2, 0, -1):
        value = (value + C[i]) * z
    return value + C[0]


@triton.jit
def _box_muller(x, y, LOG: tl.constexpr, SIN: tl.constexpr, COS: tl.constexpr):
    """As in ``philox_numpy``: cosine and sine."""
    bits = (x.to(tl.float64) + 0.5).to(tl.int64, bitcast=True)
    e = (bits - LEAST_MANTISSA) & EXPONENT
    m = (bits - e).to(tl.float64, bitcast=True)
    s = (m - 2.0**32) / (m + 2.0**32)
    r = tl.sqrt(_polynomial(s * s, LOG) * s + e.to(tl.float64) * LOG_OF_2)
    v = ((y & 0x7FFFFFFF).to(tl.float64) - (2.0**30 - 0.5)) * 2.0**-30
    q = v * v
    sin = _polynomial(q, SIN) * v
    cos = _polynomial(q, COS) * (1.0 - q)
    cos = tl.where(y >= 0x80000000, -cos, cos)
    return (cos * r).to(tl.float32), (sin * r).to(tl.float32)


@triton.jit(do_not_specialize=["key", "step", "first"])
def normals(
    OUT, SAMPLES, key, step, first, size, blocks, total,
    LISTED: tl.constexpr, LOG: tl.constexpr, SIN: tl.constexpr, COS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [B, size], SAMPLES [B] where LISTED; ``total`` is B ``blocks``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = place // blocks
    block = place - row * blocks
    if LISTED:
        sample = tl.load(SAMPLES + row, mask=place < total, other=0)
    else:
        sample = first + row
    w0, w1, w2, w3 = _words(key, NORMAL, step, sample, block)
    a, b = _box_muller(w0, w1, LOG, SIN, COS)
    c, d = _box_muller(w2, w3, LOG, SIN, COS)
    element = 4 * block
    OUT += row * size + element
    tl.store(OUT, a, mask=place < total)
    tl.store(OUT + 1, b, mask=(place < total) & (element + 1 < size))
    tl.store(OUT + 2, c, mask=(place < total) & (element + 2 < size))
    tl.store(OUT + 3, d, mask=(place < total) & (element + 3 < size))


@triton.jit(do_not_specialize=["key", "step", "first", "count"])
def uniforms(OUT, key, step, first, count, low, high, last, BLOCK: tl.constexpr):
    """OUT [count]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word, _, _, _ = _words(key, UNIFORM, step, first + row, row * 0)
    number = word.to(tl.float64) * 2.0**-32
    number = number * (tl.full([BLOCK], high, tl.float64) - low) + low
    tl.store(OUT + row, tl.minimum(number.to(tl.float32), last), mask=row < count)


@triton.jit(do_not_specialize=["key", "step", "first", "count", "high"])
def integers_below(OUT, key, step, first, count, high, BLOCK: tl.constexpr):
    """OUT [count]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low_word, high_word, _, _ = _words(key, INTEGERS, step, first + row, row * 0)
    high = high.to(tl.uint64)
    number = (high_word.to(tl.uint64) * high + ((low_word.to(tl.uint64) * high) >> 32)) >> 32
    tl.store(OUT + row, number.to(tl.int64), mask=row < count)


def _launch(kernel: Any, out: Tensor, counters: int, *arguments: object, **fixed: object) -> Tensor:
    if counters:
        places = {str(x.device) for x in (out, *arguments) if isinstance(x, Tensor)}
        if len(places) > 1:  # a kernel would read a wrong address
            raise ValueError(f"a draw got tensors on {sorted(places)}")
        with torch.cuda.device_of(out):
            kernel[(triton.cdiv(counters, BLOCK),)](
                out, *arguments, **fixed, BLOCK=BLOCK, enable_fp_fusion=False
            )
    return out


def normal(
    key: int, step: int, first: int, samples: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    """As ``philox.normal``."""
    out = torch.empty(shape, device=device)
    size = math.prod(shape[1:])
    blocks = -(-size // 4)
    total, listed = shape[0] * blocks, samples is not None
    rows = out if samples is None else sent(samples, device)
    fixed = {"LISTED": listed, "LOG": philox_numpy.LOG, "SIN": philox_numpy.SIN, "COS": philox_numpy.COS}
    return _launch(normals, out, total, rows, key, step, first, size, blocks, total, **fixed)


def uniform(
    key: int, step: int, first: int, count: int, low: float, high: float, last: float, device: torch.device
) -> Tensor:
    """As ``philox_numpy.uniform``."""
    out = torch.empty(count, device=device)
    return _launch(uniforms, out, count, key, step, first, count, low, high, last)


def integers(key: int, step: int, first: int, count: int, high: int, device: torch.device) -> Tensor:
    """As ``philox.integers``."""
    out = torch.empty(count, device=device, dtype=torch.int64)
    return _launch(integers_below, out, count, key, step, first, count, high)
