"""What the processes of a run do together: gradients and numbers averaged, turns taken."""

from __future__ import annotations

import torch
import torch.distributed
from torch import nn


def take_turn(trained: dict[str, list[nn.Parameter]], turn: str) -> None:
    """Lets gradients reach the parameters of one network alone."""
    for name, parameters in trained.items():
        for parameter in parameters:
            parameter.requires_grad_(name == turn)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces the gradients by their mean over processes, in one all-reduce."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def average_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means over processes; a NaN of any process is a NaN of all, so that all stop together."""
    flat = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(flat)
    return dict(zip(numbers, (flat / torch.distributed.get_world_size()).tolist(), strict=True))
