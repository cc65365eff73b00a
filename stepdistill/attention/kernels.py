"""Attention kernels by name: which one the networks use while they train."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepdistill.attention.fused import why_no_triton
from stepdistill.errors import UserError

NAMES = ("sdpa", "triton", "xformers", "math")


def why_not(name: str, device: torch.device) -> str | None:
    """Why an attention kernel cannot run on a device; None where it can."""
    if name == "triton":
        return why_no_triton(device)
    if name != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install stepdistill[xformers])"
    if device.type != "cuda":
        return f"xformers has no kernel for {device.type}, only for cuda"
    return None


def check_attention(name: str, device: torch.device) -> None:
    """Refuses an attention kernel that cannot run.

    Raises:
        UserError: with the reason and what can run.
    """
    reason = why_not(name, device)
    if reason:
        able = [other for other in NAMES if why_not(other, device) is None]
        raise UserError(f"train.attention is {name}, but {reason}: choose one of {', '.join(able)}")


def use_xformers(net: nn.Module) -> None:
    """Switches a diffusers network's attention to xformers' memory-efficient kernels."""
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(net, ModelMixin):
        raise UserError(f"train.attention=xformers needs a diffusers network, not {type(net).__name__}")
    net.enable_xformers_memory_efficient_attention()


@contextmanager
def attention(name: str, device: torch.device) -> Iterator[None]:
    """Within it, torch's scaled_dot_product_attention is the fused kernel it picks (``sdpa``), the plain one (``math``)
    or our own (``triton``), which leaves to torch's what it does not take. xformers is set on the networks themselves,
    see :func:`use_xformers`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    check_attention(name, device)
    if name == "math":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    elif name == "triton":
        from stepdistill.attention.rerouted import FusedMode

        with FusedMode():
            yield
    else:
        yield
