"""The GAN head of DMD2: a logit for an image from a diffusion network's inner features at a noise level."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Discriminator(nn.Module):
    """One real-or-generated logit per sample from features [B, D, h, w] or [B, N, D].

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if width % g == 0)
        self.body = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU())
        self.logit = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B]: high for real."""
        if features.ndim == 3:
            features = features.transpose(1, 2).unsqueeze(-1)  # [B, D, N, 1]
        logits: Tensor = self.logit(self.body(features).mean(dim=(2, 3))).squeeze(1)
        return logits


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(generated)), mean over samples (Goodfellow et al. 2014, 1406.2661)."""
    return F.softplus(-real).mean() + F.softplus(generated).mean()


def generator_loss(generated: Tensor) -> Tensor:
    """softplus(-D(generated)), the non-saturating form, mean over samples."""
    return F.softplus(-generated).mean()

