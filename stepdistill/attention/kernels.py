"""Attention kernels by name: which one the networks use while they train."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepdistill.attention import dispatcher
from stepdistill.attention.operators import why_no_triton
from stepdistill.errors import UserError

NAMES = ("auto", "sdpa", "triton", "xformers", "math")
"""Those that every network can take; the others are the dispatcher's."""


def why_not(name: str, device: torch.device, precision: str = "float32") -> str | None:
    """Why an attention kernel cannot train on a device; None where it can.

    Args:
        name: one of NAMES, or of ``dispatcher.names``.
        device: where.
        precision: of the arithmetic, float32 or bf16.
    """
    if name == "triton":
        return why_no_triton(device)
    if name not in NAMES:
        return dispatcher.why_not(name, device, precision)
    if name != "xformers":
        return None
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install stepdistill[xformers])"
    if device.type != "cuda":
        return f"xformers has no kernel for {device.type}, only for cuda"
    return None


def check_attention(name: str, device: torch.device, precision: str = "float32") -> None:
    """Refuses an attention kernel that cannot train on a device, whatever the network.

    Raises:
        UserError: with the reason and what can run.
    """
    if name in NAMES or name in dispatcher.names():
        reason = why_not(name, device, precision)
    else:
        reason = "no kernel is called so; stepdistill doctor lists those that are"
    if reason:
        raise UserError(f"train.attention is {name}, but {reason}: choose one of {_able(device)}")


def _able(device: torch.device) -> str:
    return ", ".join(name for name in NAMES if why_not(name, device) is None)


def fit_attention(name: str, net: nn.Module, device: torch.device) -> None:
    """Readies a network for a kernel that is not torch's own: xformers is set on its processors, where it does not ask
    diffusers' dispatcher.

    Raises:
        UserError: a kernel of the dispatcher, which the network does not ask; xformers, for a network that is not
            diffusers'.
    """
    if name in NAMES and name != "xformers":
        return
    if dispatcher.dispatches(net):
        return
    if name != "xformers":
        raise UserError(
            f"train.attention is {name}, but {type(net).__name__} does not ask diffusers' dispatcher for its "
            f"attention, so it would change nothing: choose one of {_able(device)}"
        )
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(net, ModelMixin):
        raise UserError(f"train.attention=xformers needs a diffusers network, not {type(net).__name__}")
    net.enable_xformers_memory_efficient_attention()


def told(name: str, device: torch.device, derivative: bool) -> str:
    """What a kernel's name comes to on a device, in a line.

    Args:
        name: a kernel's.
        device: where.
        derivative: whether exact derivatives are taken.
    """
    line = f"attention: {'sdpa' if name == 'auto' else name} on {device.type}"
    if not derivative:
        return line
    reason = why_no_triton(device)
    if device.type == "cuda" and reason is None:
        return f"{line}; derivatives by our own in Triton"
    return f"{line}; derivatives by our own in tiles where logits are many, else by the plain product"


@contextmanager
def attention(name: str, device: torch.device, precision: str = "float32") -> Iterator[None]:
    """Within it, torch's scaled_dot_product_attention is the fused kernel it picks (``sdpa``, and ``auto``), the plain
    one (``math``) or our own (``triton``), which leaves to torch's what it does not take; or diffusers' dispatcher
    calls the kernel of that name. Networks are readied by :func:`fit_attention`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    check_attention(name, device, precision)
    with dispatcher.within("native" if name in NAMES and name != "xformers" else name):
        if name == "math":
            with sdpa_kernel(SDPBackend.MATH):
                yield
        elif name == "triton":
            from stepdistill.attention.rerouted import FusedMode

            with FusedMode():
                yield
        else:
            yield
