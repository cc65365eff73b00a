"""How images reach a feature network's resolution: the three resizes of the literature's FID.

    clean    antialiased bicubic on floats, not rounded (Parmar et al. 2021, 2104.11222; clean-fid)
    tf1      TensorFlow 1's bilinear: asymmetric, not antialiased (the CIFAR-10 and ImageNet numbers of EDM and ADM;
             torch-fidelity)
    pytorch  bilinear about pixel centres, not antialiased (pytorch-fid)

FID differs between them by more than between good models, so every result names its own.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Literal["clean", "tf1", "pytorch"]
RESIZES: tuple[Resize, ...] = ("clean", "tf1", "pytorch")


def resize(pixels: Tensor, size: int, mode: Resize) -> Tensor:
    """uint8 or float [B, 3, H, W] to float32 [B, 3, size, size], both in [0, 255]."""
    wide = pixels.float()
    if wide.shape[-2:] == (size, size):
        return wide
    if mode == "clean":
        wide = F.interpolate(wide, (size, size), mode="bicubic", align_corners=False, antialias=True)
        return wide.clamp(0, 255)
    if mode == "pytorch":
        return F.interpolate(wide, (size, size), mode="bilinear", align_corners=False)
    return _tf1(wide, size)


def resize_clean(pixels: Tensor, size: int) -> Tensor:
    """:func:`resize` in the mode ``clean``, equal to clean-fid's PIL path to 3e-3 of 255."""
    return resize(pixels, size, "clean")


def _tf1(wide: Tensor, size: int) -> Tensor:
    """Pixel i reads at i times the ratio of the sizes, from its upper left corner, in float32 as TensorFlow does."""
    top, bottom, down = _neighbours(wide.shape[-2], size, wide.device)
    left, right, across = _neighbours(wide.shape[-1], size, wide.device)
    rows = []
    for row in (wide[..., top, :], wide[..., bottom, :]):
        start = row[..., left]
        rows.append(start + (row[..., right] - start) * across)
    return rows[0] + (rows[1] - rows[0]) * down[:, None]


def _neighbours(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of every target pixel, and the share of the second."""
    ratio = torch.tensor(length / size, dtype=torch.float32, device=device)
    place = torch.arange(size, dtype=torch.float32, device=device) * ratio
    first = place.long()
    return first, (first + 1).clamp_max(length - 1), place - first
