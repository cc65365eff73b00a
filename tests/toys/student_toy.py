"""Samplers of tiny students, and the pictures in their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.export.student_folder import TOLERANCE, VERIFICATION
from stepdistill.families.watching import frames_of
from stepdistill.networks.pictures import strip
from stepdistill.networks.sampler import Sampler

SAMPLERS = {
    "unet-ddpm": Sampler(uniform_times(1), True),
    "unet-ddim": Sampler(uniform_times(4), False),
    "unet-classes": Sampler(uniform_times(2), True),
    "dit": Sampler(uniform_times(2), False),
    "sd": Sampler(uniform_times(4), True),
    "sd-v": Sampler(uniform_times(3), False),
    "sdxl": Sampler(uniform_times(2), True, grid=50),
    "sd3": Sampler((1.0, 0.75), False),
    "flux": Sampler((1.0, 0.75), False),
    "schnell": Sampler(uniform_times(3), False),
    "wan": Sampler((1.0, 0.9), False),
    "pixart-alpha": Sampler(uniform_times(2), True),
    "pixart-sigma": Sampler(uniform_times(1), True),
    "aura-flow": Sampler((1.0, 0.75), False),
    "qwen-image": Sampler((1.0, 0.75), False),
    "z-image": Sampler(uniform_times(3), False),
    "sana": Sampler((1.0, 0.8, 0.5), False),
    "klein": Sampler((1.0, 0.75), False),
    "ltx": Sampler((1.0, 0.9), False),
    "hunyuan-video": Sampler((1.0, 0.75), False),
    "cog-video-x": Sampler(uniform_times(2), True),
    "cog-video-x-1.5": Sampler(uniform_times(4), True),
    "wan-2.2": Sampler((1.0, 0.9545, 0.875, 0.7), False),
    "cogview4": Sampler((1.0, 0.8, 0.5), False),
    "lumina2": Sampler((1.0, 0.75), False),
    "hunyuan-dit": Sampler(uniform_times(2), True),
    "chroma": Sampler(uniform_times(3), False),
    "sd3.5": Sampler((1.0, 0.75), False),
    "flux-2": Sampler((1.0, 0.75), False),
    "sana-sprint": Sampler((1.0, 0.8276), True),
    "kandinsky5": Sampler((1.0, 0.9), False),
    "text-to-video": Sampler(uniform_times(4), True),
}


def drawn(pipe: Any, folder: Path) -> Tensor:
    """What a pipeline draws by a folder's manifest, uint8 [B, 3, H, W]."""
    manifest = json.loads((folder / VERIFICATION / "manifest.json").read_text())
    generators = [torch.Generator().manual_seed(seed) for seed in manifest["seeds"]]
    call: dict[str, Any] = {**manifest["call"], "output_type": "np", "return_dict": False}
    if manifest["alone"]:
        each = zip(call["prompt"], generators, strict=True)
        images = np.concatenate([pipe(**{**call, "prompt": [p]}, generator=[g])[0] for p, g in each])
    else:
        images = pipe(**call, generator=generators)[0]
    return strip(frames_of(images * 255)).round().to(torch.uint8)


def kept(folder: Path) -> Tensor:
    """The trainer's own pictures in a folder, uint8 [B, 3, H, W]."""
    pictures = [np.array(Image.open(folder / VERIFICATION / f"{i}.png").convert("RGB")) for i in range(2)]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2)


def assert_same(images: Tensor, wanted: Tensor) -> None:
    difference = (images.int() - wanted.int()).abs().float()
    assert difference.max() <= TOLERANCE["max"] and difference.mean() <= TOLERANCE["mean"]
    assert wanted.float().std() > 2  # pictures, not one grey
