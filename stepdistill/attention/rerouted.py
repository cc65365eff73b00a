"""Calls of torch's scaled_dot_product_attention that fused attention takes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepdistill.attention.fused import LARGEST_HEAD, fused_attention, spreads


def fused_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What fused attention gives for a call of scaled_dot_product_attention; None where it does not take it: with
    dropout, a causal mask or one with a gradient, heads of more than 256 dimensions or of two sizes, or not in 4
    dimensions."""
    if dropout_p or is_causal or not query.ndim == key.ndim == value.ndim == 4:
        return None
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return None
    grouped = query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1]
    if not grouped or query.shape[3] > LARGEST_HEAD or not (query.dtype == key.dtype == value.dtype):
        return None
    if attn_mask is not None and not spreads(attn_mask, query, key):
        return None
    return fused_attention(query, key, value, attn_mask, scale)


class FusedMode(TorchFunctionMode):
    """Within it, scaled_dot_product_attention is fused attention where that takes the call, else torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (out := fused_call(*args, **kwargs)) is not None:
            return out
        return func(*args, **kwargs)
