"""Real or made, told from what frozen image networks see in pictures: a head on each (after Sauer et al. 2021,
2111.01007, whose heads read maps of features, where these read a picture's features as a whole)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.losses.gan import discriminator_loss, generator_loss, own_start
from stepdistill.losses.looks import Looks

WIDTH = 64


class PictureGan(nn.Module):
    """The losses of heads on image networks.

    Args:
        looks: pictures of latents, and the networks; no part of this module.
    """

    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self._looks = looks
        with own_start():
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(eye.dimension, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
                for eye in looks.eyes.values()
            )

    def logits(self, pictures: Tensor) -> Tensor:
        """Logits [B, H] of pictures [B, 3, H, W] in [0, 1], a column for each network, high for real."""
        seen = (eye.embed(pictures) for eye in self._looks.eyes.values())
        return torch.cat([head(each) for head, each in zip(self.heads, seen, strict=True)], 1)

    def for_generator(self, x: Tensor) -> Tensor:
        """The generator's loss of clean latents x [B, ...], a scalar, with a graph into them."""
        return generator_loss(self.logits(self._looks.decode(x)))

    def for_discriminator(self, made: Tensor, real: Tensor) -> Tensor:
        """The heads' loss of made and real clean latents [B, ...], a scalar; no graph into them."""
        with torch.no_grad():
            pictures = [self._looks.decode(x) for x in (made, real)]
        return discriminator_loss(self.logits(pictures[1]), self.logits(pictures[0]))
