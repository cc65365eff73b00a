"""Launches Triton's kernels of fused attention, in the shapes that fit their heads and the card."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from stepdistill.attention import triton_kernels
from stepdistill.attention.tiled import room_like


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut: queries and keys of a tile, warps, stages of its pipeline, and how float32 is multiplied.

    ``ieee`` takes products of float32 in full, off the tensor cores; ``tf32x3`` adds three products of TF32 on them,
    with errors as small. Products of half precision are the same in both.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    precision: str = "ieee"

    def smaller(self) -> Shape | None:
        """One that takes less shared memory. A smaller tile has fewer warps; one of tf32x3 has none smaller: its tiles
        keep 16 rows a warp and 32 columns. With 64 rows and 16 columns for 8 warps Triton's layout of the products has
        128 rows, and the tangent takes addresses out of range on an H200; for 4 warps that tile is right."""
        if self.stages > 1:
            return replace(self, stages=1)
        if self.precision == "tf32x3":
            return FULL
        if self.rows > 16 or self.columns > 16:
            rows, columns = max(16, self.rows // 2), max(16, self.columns // 2)
            return replace(self, rows=rows, columns=columns, warps=max(4, self.warps // 2))
        return None


FULL = Shape(32, 32, 8, 1)
"""For products of float32 in full, where tf32x3 does not run."""

SHAPES: dict[tuple[str, int, int], Shape] = {
    ("forward", 16, 64): Shape(64, 64, 4, 3),
    ("forward", 16, 128): Shape(64, 64, 4, 3),
    ("forward", 16, 256): Shape(64, 64, 4, 2),
    ("tangent", 16, 64): Shape(64, 64, 4, 3),
    ("tangent", 16, 128): Shape(128, 64, 8, 2),
    ("tangent", 16, 256): Shape(64, 32, 4, 1),
    ("of_queries", 16, 64): Shape(64, 64, 4, 3),
    ("of_queries", 16, 128): Shape(128, 64, 8, 3),
    ("of_queries", 16, 256): Shape(64, 32, 8, 1),
    ("of_keys", 16, 64): Shape(128, 64, 4, 2),
    ("of_keys", 16, 128): Shape(64, 64, 4, 2),
    ("of_keys", 16, 256): Shape(32, 64, 8, 1),
    ("forward", 32, 64): Shape(128, 64, 8, 2, "tf32x3"),
    ("forward", 32, 128): Shape(64, 32, 4, 1, "tf32x3"),
    ("forward", 32, 256): Shape(32, 32, 8, 1),
    ("tangent", 32, 64): Shape(128, 32, 8, 1, "tf32x3"),
    ("tangent", 32, 128): Shape(64, 32, 4, 1, "tf32x3"),
    ("tangent", 32, 256): Shape(16, 16, 16, 1),
    ("of_queries", 32, 64): Shape(64, 32, 4, 1, "tf32x3"),
    ("of_queries", 32, 128): Shape(64, 32, 4, 1, "tf32x3"),
    ("of_queries", 32, 256): Shape(16, 16, 8, 1),
    ("of_keys", 32, 64): Shape(32, 64, 4, 1, "tf32x3"),
    ("of_keys", 32, 128): Shape(32, 64, 4, 1, "tf32x3"),
    ("of_keys", 32, 256): Shape(16, 16, 8, 1),
}
"""By kernel, bits of a number and padded head: of the tiles that ``smaller`` allows, those that took least time on an
H200, to some 6 % (eval/bench/README.md), but for heads of 256 dimensions, where it is what keeps its sums in registers.
A card with less shared memory takes a smaller one at its first call."""


def _padded(count: int) -> int:
    """The next power of two, at least 16 (the least of a product)."""
    return max(16, 1 << (count - 1).bit_length())


class _Launch:
    """The arguments that the kernels share, for one call."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        self.batch, self.heads, self.n, self.d = query.shape
        self.kv_heads, self.m = key.shape[1:3]
        self.query = query
        self.width = _padded(self.d)
        self.sizes = (scale, self.heads, self.heads // self.kv_heads, self.n, self.m)
        full = (self.batch, self.heads, self.n, self.m)
        self.masked, self.added = mask is not None, mask is not None and mask.dtype != torch.bool
        self.mask = query if mask is None else mask.expand(full)
        if self.masked and not self.added:
            self.mask = self.mask.view(torch.uint8)
        self.mask_strides = (0,) * 4 if mask is None else self.mask.stride()
        self.splits = self.width >= 32 and _has_tf32(query.device)

    def shape(self, name: str) -> Shape:
        """A kernel's shape. It is not cut to few tokens: nothing runs but SHAPES and what they shrink to."""
        shape = SHAPES[self._key(name)]
        return shape if self.splits or shape.precision == "ieee" else FULL

    def _key(self, name: str) -> tuple[str, int, int]:
        return name, self.query.element_size() * 8, max(64, self.width)

    def run(self, name: str, pointers: tuple[Tensor, ...], strides: tuple[int, ...], **flags: bool) -> None:
        if any(x.device != self.query.device for x in pointers):  # a kernel would read a wrong address
            raise ValueError(f"attention's {name} got tensors on {sorted({str(x.device) for x in pointers})}")
        over_keys = name == "of_keys"
        heads, length = (self.kv_heads, self.m) if over_keys else (self.heads, self.n)
        while True:
            shape = self.shape(name)
            rows, columns = shape.rows, shape.columns
            grid = (triton.cdiv(length, columns if over_keys else rows), self.batch * heads)
            whole = self.n % rows == 0 if over_keys else self.m % columns == 0
            try:
                with torch.cuda.device_of(self.query):
                    _KERNELS[name][grid](
                        *pointers, *self.sizes, *strides,
                        D=self.d, WIDTH=self.width, ROWS=rows, COLUMNS=columns,
                        MASKED=self.masked, ADDED=self.added, WHOLE=whole,
                        TYPE=_type(self.query.dtype), PRECISION=shape.precision,
                        num_warps=shape.warps, num_stages=shape.stages, **flags,
                    )  # fmt: skip
                return
            except OutOfResources:
                smaller = shape.smaller()
                if smaller is None:
                    raise
                SHAPES[self._key(name)] = smaller


_KERNELS: dict[str, Any] = {
    "forward": triton_kernels.forward,
    "tangent": triton_kernels.tangent,
    "of_queries": triton_kernels.of_queries,
    "of_keys": triton_kernels.of_keys,
}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _type(dtype: torch.dtype) -> tl.dtype:
    """The type of products: the interpreter has none of bfloat16."""
    return tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else _TYPES[dtype]


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    """Whether a device has tensor cores for TF32: Nvidia's of compute capability 8.0 on. The interpreter needs none."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As ``tiled.forward``."""
    launch = _Launch(query, key, mask, scale)
    out, logsum = room_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    strides = (*_strides(query, key, value, out), *launch.mask_strides)
    launch.run("forward", (query, key, value, launch.mask, out, logsum), strides)
    return out, logsum


def tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    *tangents: Tensor | None,
) -> Tensor:
    """As ``tiled.tangent``."""
    launch = _Launch(query, key, mask, scale)
    rate = room_like(out)
    tq, tk, tv = (query if x is None else x for x in tangents)
    strides = (*_strides(query, key, value, out), *launch.mask_strides, *_strides(tq, tk, tv))
    pointers = (query, key, value, launch.mask, out, logsum, tq, tk, tv, rate)
    flags = {f"ALONG_{name}": x is not None for name, x in zip("QKV", tangents, strict=True)}
    launch.run("tangent", pointers, strides, **flags)
    return rate


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tiled.backward``."""
    launch = _Launch(query, key, mask, scale)
    of_query, of_key, of_value = (room_like(x) for x in (query, key, value))
    mean = torch.empty_like(logsum)
    strides = (*_strides(query, key, value, out), *launch.mask_strides, *_strides(grad, of_query))
    pointers = (query, key, value, launch.mask, out, logsum, grad, mean, of_query)
    launch.run("of_queries", pointers, strides)
    strides = (*_strides(query, key, value), *launch.mask_strides, *_strides(grad, of_key, of_value))
    launch.run("of_keys", (query, key, value, launch.mask, logsum, grad, mean, of_key, of_value), strides)
    return of_query, of_key, of_value
