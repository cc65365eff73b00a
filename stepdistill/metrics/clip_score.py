"""CLIP score: the mean cosine between the features of an image and of its own prompt (Hessel et al. 2021, 2104.08718,
without their factor 2.5 and without the clamp at zero)."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.metrics.float64 import wide


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Row-wise cosine of image features [B, D] and text features [B, D], shape [B], in [-1, 1]."""
    return torch.nn.functional.cosine_similarity(wide(images), wide(texts), dim=1)
