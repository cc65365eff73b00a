"""Networks that lie in the host's memory and compute on a GPU, where they have no room beside what is trained there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes, also while it is streamed; the CPU for one without weights."""
    from diffusers.models.modeling_utils import get_parameter_device

    empty = next(chain(network.parameters(), network.buffers()), None) is None
    return torch.device("cpu") if empty else get_parameter_device(network)


def on_host(network: nn.Module) -> nn.Module:
    """A copy in the host's memory, made without a second network on the device."""
    made: dict[int, Any] = {id(value): value.to("cpu", copy=True) for value in network.buffers()}
    for value in network.parameters():
        made[id(value)] = nn.Parameter(value.detach().to("cpu", copy=True), value.requires_grad)
    return copy.deepcopy(network, made)


@contextmanager
def streamed(networks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the ``with`` those of the networks that lie in the host's memory compute on ``device``, where that is
    another: the weights of a layer are there for its call."""
    with ExitStack() as stack:
        for network in dict.fromkeys(networks):
            if device.type != "cpu" and device_of(network).type == "cpu":
                stack.enter_context(layer_by_layer(network, device))
        yield


@contextmanager
def layer_by_layer(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The same for one network, by the hooks of diffusers' group offloading."""
    from diffusers.hooks.group_offloading import (
        _GROUP_OFFLOADING,
        _LAYER_EXECUTION_TRACKER,
        _LAZY_PREFETCH_GROUP_OFFLOADING,
        apply_group_offloading,
    )
    from diffusers.hooks.hooks import HookRegistry

    apply_group_offloading(network, device, offload_device=torch.device("cpu"), offload_type="leaf_level")
    try:
        yield
    finally:
        registry = HookRegistry.check_if_exists_or_initialize(network)
        for name in (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
            registry.remove_hook(name, recurse=True)
