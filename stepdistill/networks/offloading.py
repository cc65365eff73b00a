"""Pipelines whose networks something moves from device to device while they are called: they cannot be trained with."""

from __future__ import annotations

from typing import Any

from torch import nn

from stepdistill.errors import UserError


def check_unmoved(pipe: Any) -> None:
    """Refuses a pipeline object that diffusers offloads, or has shared out to several devices.

    Raises:
        UserError: it is such a one.
    """
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    mapped = getattr(pipe, "_is_pipeline_device_mapped", None)
    if mapped is not None and mapped():
        _refuse("has a device_map", "load it without, or call pipe.reset_device_map() first")
    if any(_offloads(part) for part in networks):
        _refuse("is offloaded to the CPU", "load it without, or call pipe.remove_all_hooks() first")
    if any(_in_groups(part) for part in networks):
        _refuse("is offloaded in groups", "load it without")


def _refuse(what: str, instead: str) -> None:
    raise UserError(f"the pipeline {what}, which moves its networks while they are called: {instead}")


def _offloads(network: nn.Module) -> bool:
    """Whether accelerate brings the network, or a part of it, to a device for each call."""
    from accelerate.hooks import CpuOffload

    hooks = [hook for part in network.modules() if (hook := getattr(part, "_hf_hook", None)) is not None]
    each = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    return any(isinstance(one, CpuOffload) or getattr(one, "offload", False) for one in each)


def _in_groups(network: nn.Module) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(network))
