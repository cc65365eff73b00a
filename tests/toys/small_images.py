"""Folders of small pictures, captioned by their names."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def pictures(folder: Path, count: int, side: int) -> Path:
    """A new folder of so many square pictures of noise."""
    folder.mkdir()
    for i in range(count):
        noise = torch.Generator().manual_seed(i)
        pixels = torch.randint(256, (side, side, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"picture {i}.png")
    return folder
