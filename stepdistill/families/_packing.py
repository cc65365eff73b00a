"""Transformers whose tokens are 2x2 patches of latents (Flux), packed by the pipeline after it has drawn its noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class PackedFamily(TransformerFamily):
    """A state is [C, H, W] as it is drawn; the network and the scheduler see tokens [H W / 4, 4 C]."""

    def patch(self, net: Any) -> int:
        return 2

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        channels, height, width = super().state_shape(pipe, size)
        return channels // 4, height, width

    def pack(self, x_t: Tensor) -> Tensor:
        patches = x_t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H / 2, 2, W / 2, 2]
        packed: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, H W / 4, 4 C]
        return packed

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        channels, height, width = state
        patches = packed.unflatten(2, (channels, 2, 2)).unflatten(1, (height // 2, width // 2))
        states: Tensor = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [B, C, H, W]
        return states


def grid_ids(x_t: Tensor) -> Tensor:
    """Where each token of states [B, C, H, W] stands: [H W / 4, 3], of 0, its row and its column."""
    height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x_t)
