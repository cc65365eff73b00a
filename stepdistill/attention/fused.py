"""Attention in one fused pass each for output, gradients and tangents, with memory linear in the tokens.

Torch's fused kernels have no forward-mode rule, so that a derivative through them falls back to the plain product of
[tokens, tokens]; this one has all three. The work is done by ``operators``, here they get their rules.

The derivative of a gradient is refused; a gradient through a tangent, which no method takes, goes by the plain product.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stepdistill.attention import operators
from stepdistill.attention.operators import NO_SECOND, packed
from stepdistill.errors import UserError

LARGEST_HEAD = 256
"""Most dimensions of a head."""


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale query key^T) value, like torch's scaled_dot_product_attention, with gradients and tangents.

    Under autocast it computes in autocast's type, as torch's does.

    Args:
        query: [B, heads, N, D], D at most 256; float32, bfloat16, float16, or float64 (in torch).
        key, value: [B, kv heads, M, D] of query's type; kv heads divides heads, and each serves heads / kv heads of
            them.
        mask: boolean, True where a query sees a key, or floating, added to the logits, and then without a gradient;
            [B | 1, heads | 1, N | 1, M] or with fewer dimensions in front. A query that sees nothing gives zeros, and
            zero gradients and tangents.
        scale: of the logits; None is 1 / sqrt(D).

    Returns:
        [B, heads, N, D] of query's type.

    Raises:
        UserError: where shapes, types or devices do not fit.
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    _check(query, key, value, mask)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = packed(query), packed(key), packed(value)
    if torch.compiler.is_compiling():
        return _traced(query, key, value, mask, scale)
    out: Tensor = _Attention.apply(query, key, value, mask, scale)[0]
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if not query.ndim == key.ndim == value.ndim == 4:
        raise UserError(
            f"attention takes tensors of 4 dimensions [B, heads, tokens, D], not {_shapes(query, key, value)}"
        )
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise UserError(
            "attention needs one batch size and head size, and as many values as keys, not "
            f"{_shapes(query, key, value)}"
        )
    if min(*query.shape, *key.shape) == 0 or query.shape[1] % key.shape[1]:
        raise UserError(
            "attention needs heads that are a multiple of the key's, and none empty, not "
            f"{_shapes(query, key, value)}"
        )
    if query.shape[3] > LARGEST_HEAD:
        raise UserError(
            f"fused attention has heads of at most {LARGEST_HEAD} dimensions, not {query.shape[3]}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise UserError(
            f"attention needs one floating type, not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if any(x.device != query.device for x in (key, value, mask) if x is not None):
        places = ", ".join(str(x.device) for x in (query, key, value, mask) if x is not None)
        raise UserError(f"attention needs all its tensors on one device, not {places}")
    if mask is not None and not spreads(mask, query, key):
        raise UserError(
            "fused attention takes a mask without gradient, boolean or floating, that spreads to "
            f"{[*query.shape[:3], key.shape[2]]}, not {mask.dtype} of shape {list(mask.shape)}"
        )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def spreads(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask broadcasts to [B, heads, N, M], with a column for each key, and has a kind the kernels take."""
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    fits = 1 <= mask.ndim <= 4 and mask.shape[-1] == full[3] and all(a in (1, b) for a, b in sizes)
    return fits and (mask.dtype == torch.bool or (mask.is_floating_point() and not mask.requires_grad))


def _traced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """For torch.compile, which does not trace a Function with a forward-mode rule: the operators, and tangents by
    hand."""
    if not _in_forward_mode():
        out: Tensor = operators.attention(query, key, value, mask, scale)[0]
        return out
    (query, *along_query), (key, *along_key), (value, *along_value) = map(
        forward_ad.unpack_dual, (query, key, value)
    )
    out, logsum = operators.attention(query, key, value, mask, scale)
    tangents = (*along_query, *along_key, *along_value)
    if all(x is None for x in tangents):
        return out
    rate = operators.attention_tangent(query, key, value, mask, scale, out, logsum, *tangents)
    dual: Tensor = forward_ad.make_dual(out, rate)
    return dual


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


class _Attention(torch.autograd.Function):
    """Output, and the logarithms of the rows' denominators, from which gradients and tangents start."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = operators.attention(query, key, value, mask, scale)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.scale = inputs
        out, logsum = output
        ctx.mark_non_differentiable(logsum)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, logsum)
        ctx.save_for_forward(*tensors, out, logsum)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, None]:
        if tangents[3] is not None:
            raise NotImplementedError(
                "fused attention has no derivative along its mask: take the math kernel"
            )
        if all(x is None for x in tangents[:3]):
            return None, None
        query, key, value, mask, out, logsum = ctx.saved_tensors
        return _Tangent.apply(query, key, value, mask, ctx.scale, out, logsum, *tangents[:3]), None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 5
        query, key, value, mask, out, logsum = ctx.saved_tensors
        return *_Gradients.apply(query, key, value, mask, ctx.scale, out, logsum, grads[0]), None, None


class _Tangent(torch.autograd.Function):
    """The output's tangent. Its gradient, which no method takes, has all logits at once."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        out: Tensor,
        logsum: Tensor,
        *tangents: Tensor | None,
    ) -> Tensor:
        rate: Tensor = operators.attention_tangent(query, key, value, mask, scale, out, logsum, *tangents)
        return rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        query, key, value, mask, ctx.scale, _, _, *tangents = inputs
        ctx.save_for_backward(query, key, value, mask, *tangents)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *given = ctx.saved_tensors
        primals = (query, key, value)
        tangents = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, given, strict=True))
        plain = functools.partial(_plain_tangent, mask, ctx.scale)
        found = torch.func.vjp(plain, *primals, *tangents)[1](grads[0])
        return (
            *found[:3],
            *(None,) * 4,
            *(g if t is not None else None for g, t in zip(found[3:], given, strict=True)),
        )


class _Gradients(torch.autograd.Function):
    """The gradients of query, key and value; they have no derivatives of their own."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        out: Tensor,
        logsum: Tensor,
        grad: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (query, key, value, mask, scale, out, logsum, grad)
        found: tuple[Tensor, Tensor, Tensor] = operators.attention_backward(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NO_SECOND)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(NO_SECOND)


def _plain_tangent(
    mask: Tensor | None,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    along_query: Tensor,
    along_key: Tensor,
    along_value: Tensor,
) -> Tensor:
    """The tangent by operations that have gradients, with all logits at once."""
    group = query.shape[1] // key.shape[1]
    key, value, along_key, along_value = (
        x.repeat_interleave(group, 1) for x in (key, value, along_key, along_value)
    )
    logits = scale * query @ key.mT
    if mask is None:
        p = logits.softmax(-1)
    else:
        least = torch.finfo(logits.dtype).min
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
        logits = logits if mask.dtype == torch.bool else logits + mask.masked_fill(~seen, 0)
        p = logits.masked_fill(~seen, least).softmax(-1) * seen
    h = scale * p * (along_query @ key.mT + query @ along_key.mT)
    return (h - p * h.sum(-1, keepdim=True)) @ value + p @ along_value
