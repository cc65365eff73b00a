"""Fused attention as torch operators: ``stepdistill::attention``, ``attention_backward`` and ``attention_tangent``.

torch.compile captures each as one node of its graph, and profilers list it by its name. Behind each stand two
implementations of one algorithm (see ``tiled``): Triton's kernels where they run, and tiles in torch elsewhere.

An operator has no forward-mode rule, and torch then takes its tangent for zero without a word: ``fused`` gives it one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from stepdistill.attention import tiled

NO_SECOND = "fused attention has no derivative of its gradients: take the math kernel (train.attention=math)"


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no kernel for {device.type}, only for cuda"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def triton_runs(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device, found once."""
    return why_no_triton(device) is None


class _Kernels(Protocol):
    """What an implementation has; see ``tiled``."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def tangent(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        out: Tensor,
        logsum: Tensor,
        *tangents: Tensor | None,
    ) -> Tensor: ...

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        out: Tensor,
        logsum: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@contextmanager
def _kernels(query: Tensor) -> Iterator[_Kernels]:
    """The implementation for a tensor; within it autocast leaves the types of its products alone."""
    kernels: Any = tiled
    if query.dtype != torch.float64 and triton_runs(query.device):
        from stepdistill.attention import triton_launch as kernels
    with torch.autocast(query.device.type, enabled=False):
        yield kernels


def packed(x: Tensor) -> Tensor:
    """With the numbers of a head next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? mask, float scale"


@torch.library.custom_op("stepdistill::attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, heads, N, D], and the logarithm of each row's denominator [B, heads, N]."""
    with _kernels(query) as kernels:
        return kernels.forward(query, key, value, mask, scale)


@torch.library.custom_op(
    "stepdistill::attention_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor out, Tensor logsum, Tensor grad) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from that of the output."""
    with _kernels(query) as kernels:
        return kernels.backward(query, key, value, mask, scale, out, logsum, packed(grad))


@torch.library.custom_op(
    "stepdistill::attention_tangent",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor out, Tensor logsum, Tensor? along_query, Tensor? along_key, Tensor? along_value)"
    " -> Tensor",
)
def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    logsum: Tensor,
    along_query: Tensor | None,
    along_key: Tensor | None,
    along_value: Tensor | None,
) -> Tensor:
    """The output's tangent along those of query, key and value; None is a tangent of zeros."""
    tangents = (None if x is None else packed(x) for x in (along_query, along_key, along_value))
    with _kernels(query) as kernels:
        return kernels.tangent(query, key, value, mask, scale, out, logsum, *tangents)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return tiled.room_like(query), query.new_empty(query.shape[:3], dtype=wide)


@attention_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tiled.room_like(query), tiled.room_like(key), tiled.room_like(value)


@attention_tangent.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, out: Tensor, *others: Any
) -> Tensor:
    return tiled.room_like(out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, out, logsum = ctx.saved_tensors
    return *attention_backward(query, key, value, mask, ctx.scale, out, logsum, grad), None, None


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(NO_SECOND)


attention.register_autograd(_gradients, setup_context=_save)
attention_backward.register_autograd(_refuse)
