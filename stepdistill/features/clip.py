"""A transformers CLIPModel: features of images and of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.features.network import DTYPES, Precision, titled
from stepdistill.features.resize import resize_clean
from stepdistill.system.float32 import full_float32
from stepdistill.system.memory import sent


class ClipFeatures:
    """A transformers CLIPModel; L2-normalised features of both towers.

    Args:
        folder: CLIPModel folder (config.json, model.safetensors).
        tokenizer: folder of its tokenizer.
        name: its specification.
        sha256: of its weights.
        fd_name, fd_scale, clip_name: see :class:`FeatureNetwork`.
        mean, std: of the pixels in [0, 1], per channel.
        precision: of the tower that looks at images.
        device: where it runs.

    ``logit_scale`` is the factor of the cosine in the model's own loss, which PickScore reads.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        *,
        name: str,
        sha256: str,
        fd_name: str,
        fd_scale: float,
        clip_name: str,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision,
        device: torch.device,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._model = model.eval().requires_grad_(False).to(device)
        self._dtype = DTYPES[precision]
        model.vision_model.to(self._dtype)
        model.visual_projection.to(self._dtype)
        self._tokenizer = AutoTokenizer.from_pretrained(
            tokenizer, local_files_only=True, trust_remote_code=False
        )
        self._mean = 255 * torch.tensor(mean).view(1, 3, 1, 1).to(device)
        self._std = 255 * torch.tensor(std).view(1, 3, 1, 1).to(device)
        self._size = int(model.config.vision_config.image_size)
        self._length = int(model.config.text_config.max_position_embeddings)
        self.device = device
        self.name, self.precision, self.fd_scale = name, precision, fd_scale
        self.fd_name, self.clip_name = titled(fd_name, precision), titled(clip_name, precision)
        self.dimension = int(model.config.projection_dim)
        self.logit_scale = float(model.logit_scale.exp())
        self.resize = f"clean (bicubic, antialiased, float) to {self._size}"
        self.kernel_scale = 1.0  # unit vectors: the kernel is (cosine + 1)^3
        self.sha256 = sha256

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit features [B, D] of images [B, 3, H, W] in [0, 255], uint8 or float, with a graph."""
        wide = (resize_clean(sent(pixels, self.device), self._size) - self._mean) / self._std
        projected = self._model.get_image_features(pixel_values=wide.to(self._dtype)).pooler_output  # [B, D]
        return F.normalize(projected.float(), dim=1)

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        return self.embed(pixels)

    @torch.no_grad()
    @full_float32()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        projected = self._model.get_text_features(
            input_ids=sent(tokens.input_ids, self.device),
            attention_mask=sent(tokens.attention_mask, self.device),
        ).pooler_output
        return F.normalize(projected.float(), dim=1)
