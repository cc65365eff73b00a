"""What the networks of a run compute in."""

from __future__ import annotations

import torch


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The arithmetic of ``train.precision``. It is not accelerate's: that is one for a whole process, which may run
    several recipes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
