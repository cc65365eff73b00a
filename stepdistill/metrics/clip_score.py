"""CLIP score: the mean cosine between the features of an image and of its own prompt (Hessel et al. 2021, 2104.08718,
without their factor 2.5 and without the clamp at zero)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MeanState:
    """A streaming mean in float64, merged in any order."""

    count: int = 0
    total: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in numbers [B]."""
        self.count += len(values)
        self.total += float(values.detach().double().sum())

    def merge(self, other: MeanState) -> MeanState:
        """The mean of both sets."""
        return MeanState(self.count + other.count, self.total + other.total)

    @property
    def mean(self) -> float:
        """The mean; needs one number."""
        return self.total / self.count


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Row-wise cosine of image features [B, D] and text features [B, D], shape [B], in [-1, 1]."""
    return torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)
