"""Float64 where the features lie: every sum and distance is computed on their device."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU where it has no float64 (Apple's GPUs)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def wide(x: Tensor) -> Tensor:
    """A tensor in float64 without a graph, on :func:`float64_device` of its own."""
    return x.detach().to(float64_device(x.device)).double()
