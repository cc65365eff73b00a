"""The GAN of DMD2 (Yin et al. 2024, 2405.14867, 4.3): real or generated, told from a diffusion network's features."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.diffusion.draws import generator_for
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.networks.denoiser import Denoiser


class Discriminator(nn.Module):
    """Real-or-generated logits of a sample from the map of its features: the head of DMD2's code.

    4x4 convolutions of stride 2 halve the map until no side is above 4, one more as large as what is left takes it to
    1x1, and a last one to a number; a map of 4x4 or less is met by that one more alone. Norms stand behind
    convolutions, never before the first, which is to see how large features are.

    Args:
        shape: (D, h, w) of the features.
        outputs: how many logits it has, each a discriminator of its own but for what lies before the last layer.
        relativistic: whether differences of logits alone are read: they then have no constant to learn.
    """

    def __init__(self, shape: tuple[int, int, int], outputs: int = 1, *, relativistic: bool = False) -> None:
        super().__init__()
        self.shape = shape
        width, height, breadth = shape
        # Four channels or more in a group: on a map of 1x1, a group of one channel would be normalised to nothing.
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if (width % g == 0 and width >= 4 * g) or g == 1)
        layers: list[nn.Module] = []
        while max(height, breadth) > 4 and min(height, breadth) > 1:
            layers.append(nn.Conv2d(width, width, 4, stride=2, padding=1))
            layers += [nn.GroupNorm(groups, width), nn.SiLU()]
            height, breadth = height // 2, breadth // 2
        layers.append(nn.Conv2d(width, width, (height, breadth)))
        layers += [
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, outputs, 1, bias=not relativistic),
        ]
        self.body = nn.Sequential(*layers)

    def forward(self, features: Tensor, output: int = 0) -> Tensor:
        """Logits [B] of one output, high for real, of features [B, D, h, w], or of the tokens [B, h w, D] of a
        transformer."""
        if features.ndim == 3:
            features = features.transpose(1, 2).unflatten(2, self.shape[1:])  # [B, D, h, w]
        logits: Tensor = self.body(features)[:, output].mean(dim=(1, 2))
        return logits


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(generated)), mean over samples (Goodfellow et al. 2014, 1406.2661)."""
    return F.softplus(-real).mean() + F.softplus(generated).mean()


def generator_loss(generated: Tensor) -> Tensor:
    """softplus(-D(generated)), the non-saturating form, mean over samples."""
    return F.softplus(-generated).mean()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(D(better) - D(worse))), mean over pairs of samples (Jolicoeur-Martineau 2018, 1807.00734): of the
    discriminator with the real one as the better, of the generator with its own. Only differences of logits count."""
    return F.softplus(worse - better).mean()


class FeatureGan(nn.Module):
    """The two losses of a discriminator that reads a diffusion network's features of noised latents.

    Args:
        eye: the network whose features it reads; not a part of this module.
        outputs, relativistic: of its head, see ``Discriminator``.
    """

    def __init__(self, eye: Denoiser, outputs: int = 1, *, relativistic: bool = False) -> None:
        super().__init__()
        self.eye = eye
        with torch.random.fork_rng(
            devices=[]
        ):  # its start follows from its width, not from the global generator
            torch.default_generator.manual_seed(generator_for("discriminator").initial_seed())
            shape = eye.family.feature_shape(eye.net, eye.shape)
            self.head = Discriminator(shape, outputs, relativistic=relativistic)

    def logits(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits [B] of x_t [B, ...] at t [B]: at its best, log of the density of real over that of generated."""
        return cast(Tensor, self.head(self.eye.features(x_t, t, cond)))

    def logits_above(self, x_e: Tensor, e: Tensor, start: Tensor, cond: Condition, batch: Batch) -> Tensor:
        """Logits [B] of x_e [B, ...] noised from e [B] to a time between e and ``start`` [B]; noise and time are
        the same for both kinds of a batch."""
        path = self.eye.path
        t = path.shifted(torch.lerp(path.unshifted(e), path.unshifted(start), batch.draws.uniform("gan t")))
        eps = batch.draws.normal("gan eps", tuple(x_e.shape[1:]))
        return self.logits(path.renoise(x_e, e, t, eps), t, cond)

    def _logits(self, x: Tensor, cond: Condition, batch: Batch, stream: str) -> Tensor:
        """Logits [B] of x noised to uniform times of the schedule: one law for real and generated, with draws of
        their own."""
        draws, path = batch.draws, self.eye.path
        t, eps = path.shifted(draws.uniform(f"{stream} t")), draws.normal(f"{stream} eps", tuple(x.shape[1:]))
        return self.logits(path.noised(x, eps, t), t, cond)

    def for_generator(self, x: Tensor, batch: Batch) -> Tensor:
        """The generator's loss for its samples x [B, ...]; gradients flow through the features into x."""
        return generator_loss(self._logits(x, batch.cond, batch, "gan"))

    def for_discriminator(self, x: Tensor, images: Examples, batch: Batch) -> Tensor:
        """The discriminator's loss on generated x [B, ...] and real images."""
        real = self._logits(images.x0, images.cond, batch, "gan real")
        return discriminator_loss(real, self._logits(x, batch.cond, batch, "gan"))
