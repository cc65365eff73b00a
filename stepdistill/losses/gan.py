"""The GAN of DMD2 (Yin et al. 2024, 2405.14867, 4.3): real or generated, told from a diffusion network's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.diffusion.draws import Draws, generator_for
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.switched import networks_in


class Discriminator(nn.Module):
    """Real-or-generated logits of a sample from the map of its features: the head of DMD2's code.

    4x4 convolutions of stride 2 halve the map until no side is above 4, one more as large as what is left takes it to
    1x1, and a last one to a number; a map of 4x4 or less is met by that one more alone. Norms stand behind
    convolutions, never before the first, which is to see how large features are.

    Args:
        shape: (D, h, w) of the features.
        outputs: how many logits it has, each a discriminator of its own but for what lies before the last layer.
        relativistic: whether differences of logits alone are read: they then have no constant to learn.
        inner: channels behind its first convolution; None is D.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int = 1,
        *,
        relativistic: bool = False,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels, height, breadth = shape
        width = inner or channels
        # Four channels or more in a group: on a map of 1x1, a group of one channel would be normalised to nothing.
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if (width % g == 0 and width >= 4 * g) or g == 1)
        layers: list[nn.Module] = []
        while max(height, breadth) > 4 and min(height, breadth) > 1:
            layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=1))
            layers += [nn.GroupNorm(groups, width), nn.SiLU()]
            height, breadth, channels = height // 2, breadth // 2, width
        layers.append(nn.Conv2d(channels, width, (height, breadth)))
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


@contextmanager
def own_start() -> Iterator[None]:
    """Inside the ``with`` a discriminator's start follows from its width, not from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_for("discriminator").initial_seed())
        yield


class Heads(nn.Module):
    """A head for each of the maps of features that a network has at several depths.

    Args:
        shapes: (D, h, w) of each.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.each = nn.ModuleList(map(Discriminator, shapes))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, H], a column for each head."""
        return torch.stack([head(own) for head, own in zip(self.each, maps, strict=True)], 1)


def over_heads(each: Tensor) -> Tensor:
    """What the logits [B] or [B, H] each cost: their sum over heads, mean over samples."""
    return each.reshape(len(each), -1).sum(1).mean()


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(generated)), mean over samples (Goodfellow et al. 2014, 1406.2661)."""
    return over_heads(F.softplus(-real)) + over_heads(F.softplus(generated))


def generator_loss(generated: Tensor) -> Tensor:
    """softplus(-D(generated)), the non-saturating form, mean over samples."""
    return over_heads(F.softplus(-generated))


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(generated)), mean over samples; a generator then minimises -D."""
    return over_heads((1 - real).clamp_min(0)) + over_heads((1 + generated).clamp_min(0))


Law = Callable[[Draws, str], Tensor]
"""The times [B] to which a discriminator's inputs are noised, before a flow teacher's shift, by draws and a stream."""


def uniform(draws: Draws, stream: str) -> Tensor:
    """Any time."""
    return draws.uniform(stream)


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """softplus(-(D(better) - D(worse))), mean over pairs of samples (Jolicoeur-Martineau 2018, 1807.00734): of the
    discriminator with the real one as the better, of the generator with its own. Only differences of logits count."""
    return F.softplus(worse - better).mean()


class FeatureGan(nn.Module):
    """The losses of a discriminator that reads a diffusion network's features of noised latents.

    Args:
        eye: the network whose features it reads; not a part of this module.
        outputs, relativistic: of its head, see ``Discriminator``.
        deep: whether it has a head at each of the family's ``feature_layers``; else it has one, at ``features_of``.
        times: the law of the times that real and generated samples are noised to.
        hinge: whether its losses are the hinge and -D; else they are of softplus.
    """

    def __init__(
        self,
        eye: Denoiser,
        outputs: int = 1,
        *,
        relativistic: bool = False,
        deep: bool = False,
        times: Law = uniform,
        hinge: bool = False,
    ) -> None:
        super().__init__()
        self.eye, self.deep, self.times, self.hinge = eye, deep, times, hinge
        with own_start():
            family = eye.family
            self.head = (
                Heads(family.layer_shapes(networks_in(eye.net)[0], eye.shape))  # of several, each has its own
                if deep
                else Discriminator(
                    family.feature_shape(eye.net, eye.shape), outputs, relativistic=relativistic
                )
            )

    @property
    def heads(self) -> int:
        """How many logits a sample has."""
        return len(self.head.each) if isinstance(self.head, Heads) else 1

    def seen(self, x_t: Tensor, t: Tensor, cond: Condition) -> Any:
        """What the head is given of x_t [B, ...] at t [B]: a map of features, or those of several depths."""
        return self.eye.feature_maps(x_t, t, cond) if self.deep else self.eye.features(x_t, t, cond)

    def logits(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Logits [B], or [B, H] of H heads, of x_t [B, ...] at t [B]: at its best, log of the density of real over
        that of generated."""
        return cast(Tensor, self.head(self.seen(x_t, t, cond)))

    def logits_above(self, x_e: Tensor, e: Tensor, start: Tensor, cond: Condition, batch: Batch) -> Tensor:
        """Logits [B] of x_e [B, ...] noised from e [B] to a time between e and ``start`` [B]; noise and time are
        the same for both kinds of a batch."""
        path = self.eye.path
        t = path.shifted(torch.lerp(path.unshifted(e), path.unshifted(start), batch.draws.uniform("gan t")))
        eps = batch.draws.normal("gan eps", tuple(x_e.shape[1:]))
        return self.logits(path.renoise(x_e, e, t, eps), t, cond)

    def noised(self, x: Tensor, batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
        """x [B, ...] noised, and its times [B]: one law for real and generated, with draws of their own."""
        draws, path = batch.draws, self.eye.path
        t = path.shifted(self.times(draws, f"{stream} t"))
        eps = draws.normal(f"{stream} eps", tuple(x.shape[1:]))
        return path.noised(x, eps, t), t

    def for_generator(self, x: Tensor, batch: Batch) -> Tensor:
        """The generator's loss for its samples x [B, ...]; gradients flow through the features into x."""
        logits = self.logits(*self.noised(x, batch, "gan"), batch.cond)
        return -over_heads(logits) if self.hinge else generator_loss(logits)

    def for_discriminator(self, x: Tensor, images: Examples, batch: Batch) -> Tensor:
        """The discriminator's loss on generated x [B, ...] and real images."""
        real = self.logits(*self.noised(images.x0, batch, "gan real"), images.cond)
        made = self.logits(*self.noised(x, batch, "gan"), batch.cond)
        return hinge_loss(real, made) if self.hinge else discriminator_loss(real, made)

    def gradient_penalty(self, images: Examples, batch: Batch) -> Tensor:
        """R1, half the squared gradient of the logits of real images, in what the heads are given (Mescheder et al.
        2018, 1801.04406; in features, as of ADD, Sauer et al. 2023, 2311.17042): summed over heads, mean over samples.
        In the images themselves it would be a second derivative of the eye."""
        with torch.no_grad():
            seen = self.seen(*self.noised(images.x0, batch, "gan real"), images.cond)
        maps = [each.requires_grad_(True) for each in (seen if self.deep else [seen])]
        with torch.enable_grad():
            logits = self.head(maps if self.deep else maps[0])
            slopes = torch.autograd.grad(logits.sum(), maps, create_graph=True)
        return torch.stack([0.5 * each.square().flatten(1).sum(1).mean() for each in slopes]).sum()
