"""Attention kernels that diffusers' dispatcher names, for networks whose processors ask it: Flux, Wan, Qwen-Image, ...

The others (UNets, DiT, PixArt, SD3, Sana) call torch's scaled_dot_product_attention, whatever the dispatcher is told. A
kernel is chosen within diffusers' context manager alone: ``model.set_attention_backend`` also moves the default of all
other networks of the process, and nothing moves it back.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager

import torch
from torch import nn

HUB = "_hub"
"""How the names of kernels end that are downloaded."""


def names() -> tuple[str, ...]:
    """What the installed diffusers names."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return tuple(backend.value for backend in AttentionBackendName)


def dispatches(net: nn.Module) -> bool:
    """Whether any attention of a network asks the dispatcher: its processor then has a place for the answer."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, MochiAttention

    kinds = (Attention, MochiAttention, AttentionModuleMixin)
    found = (module.processor for module in net.modules() if isinstance(module, kinds))
    return any("_attention_backend" in dir(processor) for processor in found)


def within(name: str) -> AbstractContextManager[None]:
    """Within it the dispatcher calls a kernel."""
    from diffusers.models.attention_dispatch import attention_backend

    return attention_backend(name)


@functools.cache
def why_not(name: str, device: torch.device, precision: str) -> str | None:
    """Why a kernel of the dispatcher cannot train on a device; None where it can: it was tried, with gradients."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.utils.constants import DIFFUSERS_TRUST_REMOTE_KERNELS

    if name.endswith(HUB) and not DIFFUSERS_TRUST_REMOTE_KERNELS:
        return "it downloads code and runs it, which takes DIFFUSERS_TRUST_REMOTE_KERNELS=true"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    query, key, value = (
        torch.zeros(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )  # [B, N, heads, D]
    try:
        with warnings.catch_warnings(), within(name):
            warnings.simplefilter("ignore")
            out = dispatch_attention_fn(query, key, value)
            if not out.requires_grad:
                return "it has no gradients"
            torch.autograd.grad(out.sum(), (query, key, value))
    except Exception as error:  # of whatever kind others' kernels raise
        told = " ".join(str(error).split())
        if "is not usable" in told:  # what is missing stands in the last sentence
            return told.rpartition("Please ")[2].rstrip(".")
        return f"it does not train on {device.type} in {precision}: {told.partition('. ')[0][:100]}"
    return None
