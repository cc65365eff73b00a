"""Philox4x32-10: random numbers that are a function of a key and a counter, the same bits on every device.

J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: ten rounds turn a
counter of four words of 32 bits, under a key of two, into four random words. Here the counter is

    word 0: block of four elements    word 1: sample    word 2: step    word 3: law (normal, uniform, ...)

so that steps and samples up to 2^32 and elements up to 2^34 each have words of their own.

Words become numbers by additions, products, quotients and roots of float64 alone, which IEEE 754 defines to the last
bit, in one order that is written twice: here for the processor, and in ``philox_triton`` for a GPU. Normal numbers are
Box and Muller's (1958): the square root of -2 ln u times the cosine and sine of a uniform angle, with polynomials for
logarithm, cosine and sine (Chebyshev interpolation; relative errors below 5e-11, a thousandth of float32's last place).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepdistill.system.memory import sent

NORMAL, UNIFORM, INTEGERS, SHARED = range(4)
"""The laws: word 3 of the counter."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

MASK = 0xFFFFFFFF
SHIFT = np.uint64(32)

LOG = (-4.000000000016719, -1.3333333049497504, -0.8000076934475038, -0.5707010207563262, -0.4723271819829197)
"""-2 ln m = s LOG(s^2) with s = (m - 1) / (m + 1), for m between the square roots of 1/2 and 2."""

LOG_OF_2 = -2 * 0.6931471805599453 * 2.0**-52
"""-2 ln 2, for an exponent that stands 52 bits to the left."""

LEAST_MANTISSA = 0x3FE6A09E667F3BCD + (32 << 52)
"""The bits of 2^32 sqrt(1/2) in float64."""

EXPONENT = -(1 << 52)
"""The bits of a float64's sign and exponent."""

SIN = (
    1.570796326768066,
    -0.645964095574125,
    0.07969260368557585,
    -0.004681657707277992,
    0.00016025459023725092,
    -3.431788991798387e-06,
)
"""sin(pi x / 2) = x SIN(x^2), for x in [-1, 1]."""

COS = (
    0.9999999999970073,
    -0.2337005499206662,
    0.019968955248795786,
    -0.0008945122466334715,
    2.4716479526910826e-05,
    -4.4616354394835996e-07,
)
"""cos(pi x / 2) = (1 - x^2) COS(x^2), for x in [-1, 1]."""

CHUNK = 8192
"""Counters that are turned into words together: they and their numbers stay in a processor's cache (0.8 MB)."""

Words = NDArray[np.uint64]
Floats = NDArray[np.float64]


def normal(
    key: int, step: int, first: int, samples: Tensor | None, shape: Sequence[int], device: torch.device
) -> Tensor:
    """As the operator, ``philox.normal``; drawn on the processor."""
    rows, size = shape[0], math.prod(shape[1:])
    blocks = -(-size // 4)
    numbers = np.empty((rows * blocks, 2, 2), np.float32)  # [blocks, radii, cosine and sine]
    room = np.empty((3, 2, min(CHUNK, len(numbers))))
    for place, x, y in _words(key, NORMAL, step, _rows(first, samples, rows), blocks):
        _box_muller(x, y, room[:, :, : x.shape[1]], numbers[place].transpose(2, 1, 0))
    whole = np.ascontiguousarray(numbers.reshape(rows, 4 * blocks)[:, :size])
    return sent(torch.from_numpy(whole.reshape(shape)), device)


def uniform(
    key: int, step: int, first: int, count: int, low: float, high: float, last: float, device: torch.device
) -> Tensor:
    """As ``philox.uniform``, with bounds that float32 has and the last number below ``high``."""
    numbers = np.empty(count, np.float32)
    for place, x, _ in _words(key, UNIFORM, step, _rows(first, None, count), 1):
        share = x[0] * 2.0**-32
        share *= high - low
        share += low
        numbers[place] = share
    return sent(torch.from_numpy(np.minimum(numbers, np.float32(last))), device)


def integers(key: int, step: int, first: int, count: int, high: int, device: torch.device) -> Tensor:
    """As ``philox.integers``."""
    numbers = np.empty(count, np.int64)
    for place, x, y in _words(key, INTEGERS, step, _rows(first, None, count), 1):
        numbers[place] = _below(high, x[0], y[0])
    return sent(torch.from_numpy(numbers), device)


def shared_integer(key: int, step: int, high: int) -> int:
    """One integer in 0 .. high - 1 for all samples of a step, drawn on the processor."""
    ((_, x, y),) = _words(key, SHARED, step, np.zeros(1, np.int64), 1)
    return int(_below(high, x[0], y[0])[0])


def _rows(first: int, samples: Tensor | None, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count) if samples is None else samples.cpu().numpy()


def _words(
    key: int, law: int, step: int, samples: NDArray[np.int64], blocks: int
) -> Iterator[tuple[slice, Words, Words]]:
    """The random words of ``blocks`` counters for each sample, in chunks: where they belong among all of them, words 0
    and 2 [2, m] and words 1 and 3 [2, m], each in the lower half of 64 bits, to be written over."""
    total = len(samples) * blocks
    room = np.empty((3, 2, min(CHUNK, total)), np.uint64)
    for start in range(0, total, CHUNK):
        place = slice(start, min(start + CHUNK, total))
        counter = np.arange(place.start, place.stop)
        row = counter // blocks
        x, y, products = room[:, :, : len(counter)]
        x[0], y[0], x[1], y[1] = counter - row * blocks, samples[row], step, law
        yield place, *philox(x, y, products, key)


def philox(x: Words, y: Words, products: Words, key: int) -> tuple[Words, Words]:
    """The ten rounds: words 0 and 2 in ``x``, 1 and 3 in ``y``, all [2, m] and written over.

    A product's lower half is masked only at the end: what stands above it is masked out of the word that it enters.
    """
    factors = np.array(MULTIPLIERS, np.uint64)[:, None]
    keys = [
        [[(half + i * step) & MASK] for half, step in zip((key, key >> 32), INCREMENTS, strict=True)]
        for i in range(ROUNDS)
    ]
    for own in np.array(keys, np.uint64):
        np.multiply(x, factors, out=products)
        y, products = products[::-1], y
        np.right_shift(y, SHIFT, out=x)
        x ^= products
        x ^= own
        x &= MASK
    y &= MASK
    return x, y


def _box_muller(x: Words, y: Words, room: Floats, out: NDArray[np.float32]) -> None:
    """Two normal numbers, out [2, 2, m], of each word in ``x`` [2, m] for the radius and in ``y`` for the angle."""
    f, s, r = room
    # x + 1/2 = 2^32 u = 2^32 m 2^e with m between the square roots of 1/2 and 2; r = sqrt(-2 ln u).
    np.add(x, 0.5, out=f)
    bits, e = f.view(np.int64), x.view(np.int64)
    np.subtract(bits, LEAST_MANTISSA, out=e)
    e &= EXPONENT
    bits -= e
    np.subtract(f, 2.0**32, out=s)
    f += 2.0**32
    s /= f
    np.multiply(s, s, out=f)
    _polynomial(f, LOG, r)
    r *= s
    np.multiply(e, LOG_OF_2, out=s)
    r += s
    np.sqrt(r, out=r)
    # An angle pi v / 2 of the right half of the circle from 31 bits; the last one is the cosine's sign.
    v, value = f, x.view(np.float64)
    np.bitwise_and(y, 0x7FFFFFFF, out=x)
    np.subtract(x, 2.0**30 - 0.5, out=v)
    v *= 2.0**-30
    q = np.multiply(v, v, out=s)
    _polynomial(q, SIN, value)
    value *= v
    np.multiply(value, r, out=out[1], casting="same_kind")
    _polynomial(q, COS, value)
    np.subtract(1.0, q, out=q)
    value *= q
    y &= 0x80000000
    y <<= SHIFT
    sign = value.view(np.uint64)
    sign ^= y
    np.multiply(value, r, out=out[0], casting="same_kind")


def _polynomial(z: Floats, coefficients: tuple[float, ...], out: Floats) -> None:
    """By Horner's rule, the coefficients from the constant on."""
    np.multiply(z, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        out += coefficient
        out *= z
    out += coefficients[0]


def _below(high: int, low_word: Words, high_word: Words) -> Words:
    """floor(w high / 2^64) for the number w of 64 bits: unequal by at most 2^-32 of a probability (D. Lemire 2019)."""
    bound = np.uint64(high)
    return high_word * bound + (low_word * bound >> SHIFT) >> SHIFT
