"""DINOv2's class token as features (Oquab et al. 2023, 2304.07193), for the Frechet distance that follows human
judgement better than FID does (Stein et al. 2023, 2306.04675): FD-DINOv2 of the literature is ViT-L/14 at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.features.network import DTYPES, Precision, titled
from stepdistill.features.resize import resize
from stepdistill.system.float32 import full_float32
from stepdistill.system.memory import sent

SIZE = 224


class DinoFeatures:
    """A transformers Dinov2Model; its normalised class token [B, D], D = 1,024 for ViT-L.

    Args:
        folder: Dinov2Model folder (config.json, model.safetensors).
        name: its specification.
        sha256: of its weights.
        mean, std: of the pixels in [0, 1], per channel.
        precision: of the network.
        device: where it runs.
    """

    fd_scale = 1.0
    clip_name = None

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        sha256: str,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
        device: torch.device,
    ) -> None:
        from transformers import Dinov2Model

        model: Any = Dinov2Model.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._model = model.eval().requires_grad_(False).to(device, DTYPES[precision])
        self.precision, self._dtype = precision, DTYPES[precision]
        self._mean = 255 * torch.tensor(mean).view(1, 3, 1, 1).to(device)
        self._std = 255 * torch.tensor(std).view(1, 3, 1, 1).to(device)
        self.device = device
        self.name, self.sha256 = name, sha256
        self.dimension = int(model.config.hidden_size)
        self.kernel_scale = 1 / self.dimension
        self.fd_name = titled(f"FD-DINOv2 ({folder.name})", precision)
        self.resize = f"clean (bicubic, antialiased, float) to {SIZE}"

    def embed(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] in [0, 255], uint8 or float, with a graph."""
        wide = (resize(sent(pixels, self.device), SIZE, "clean") - self._mean) / self._std
        token: Tensor = self._model(pixel_values=wide.to(self._dtype)).last_hidden_state[:, 0]
        return token.float()

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        return self.embed(pixels)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise UserError("DINOv2 has no text features: set clip_score to false in the suite")
