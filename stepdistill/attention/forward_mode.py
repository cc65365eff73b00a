"""Attention and GroupNorm re-routed to kernels that have a forward-mode rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepdistill.attention import dispatcher
from stepdistill.attention.operators import triton_runs
from stepdistill.attention.rerouted import fused_call

TILES_PAY = 512 * 512
"""Queries times keys from which tiles in torch overtake the plain product on a processor: measured on one core with
heads of 64 dimensions, equal below, twice as fast from 1,024 tokens on, and with memory linear in the tokens."""


class ForwardMode(TorchFunctionMode):
    """Within it, attention and GroupNorm take kernels that have a forward-mode rule.

    Attention is fused where Triton runs and where its logits are many; the plain product is left for few logits, and
    for calls that fused attention does not take, such as causal ones.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            if _pays(*args[:2], **{name: kwargs[name] for name in ("query", "key") if name in kwargs}):
                fused = fused_call(*args, **kwargs)
                if fused is not None:
                    return fused
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func is F.group_norm:
            return func(args[0].contiguous(), *args[1:], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def forward_mode() -> Iterator[None]:
    """:class:`ForwardMode`, with diffusers' dispatcher calling what that re-routes, whatever kernel was chosen."""
    with dispatcher.within("native"), ForwardMode():
        yield


def _pays(query: Tensor, key: Tensor) -> bool:
    if query.device.type == "cuda" and triton_runs(query.device):
        return True
    return query.shape[-2] * key.shape[-2] >= TILES_PAY
