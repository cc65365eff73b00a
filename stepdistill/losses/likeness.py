"""How alike pictures are: the sliced Wasserstein distance of their patches, and the cosine of their features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.diffusion.draws import Draws
from stepdistill.losses.looks import Eye, Looks

SCALES = 3
"""The picture itself, its half and its quarter."""


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """The mean over directions of the squared Wasserstein distance of two sets of points along each, [B]. Of a set and
    the same moved by c it is |c|^2 / d in expectation.

    Args:
        a, b: sets of P points, [B, P, d] each.
        directions: unit vectors [B, K, d].
    """
    along = [(points @ directions.transpose(1, 2)).sort(1).values for points in (a, b)]
    return (along[0] - along[1]).square().mean((1, 2))


def patches(pictures: Tensor) -> Tensor:
    """All patches of 3 x 3 pixels of pictures [B, C, H, W], as points [B, P, 9 C]."""
    return F.unfold(pictures, 3).transpose(1, 2)


def patch_distance(a: Tensor, b: Tensor, draws: Draws, count: int = 64) -> Tensor:
    """The sliced Wasserstein distance of the patches of pictures [B, C, H, W], mean over scales, [B] (after Heitz et
    al. 2021, 2006.07229).

    Args:
        a, b: the pictures.
        draws: from which the directions are drawn.
        count: of directions.
    """
    total, dimension = a.new_zeros(len(a)), 9 * a.shape[1]
    directions = F.normalize(draws.normal("directions", (count, dimension)).to(a), dim=2)
    for scale in range(SCALES):
        shrunk = [F.avg_pool2d(each, 2**scale) if scale else each for each in (a, b)]
        if min(shrunk[0].shape[2:]) < 3:
            return total / scale if scale else total
        total = total + sliced_wasserstein(patches(shrunk[0]), patches(shrunk[1]), directions)
    return total / SCALES


def apart(looks: Looks, x: Tensor, target: Tensor, draws: Draws) -> dict[str, Tensor]:
    """How far clean latents [B, ...] are from others, in three ways, each [B]: 1 - the cosine of the first network's
    features, the mean square in latents, and the patches' distance; with a graph into the first."""
    with torch.no_grad():
        wanted = looks.decode(target)
    picture = looks.decode(x)
    return {
        "identity": 1 - likeness(looks.first, picture, wanted),
        "squared": (x - target).square().flatten(1).mean(1),
        "wasserstein": patch_distance(picture, wanted, draws),
    }


def likeness(eye: Eye, a: Tensor, b: Tensor) -> Tensor:
    """The cosine [B] of what a network sees in pictures [B, 3, H, W] in [0, 1]."""
    return F.cosine_similarity(eye.embed(a), eye.embed(b), dim=1)


@torch.no_grad()
def mixed_in(looks: Looks, x0: Tensor, made: Tensor, which: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Clean latents [B, ...] with made ones in the place of some, and the share of these.

    Args:
        looks: what likeness is measured in.
        x0, made: the latents.
        which: whose place may be given, [B].
        floor: the least cosine of a made picture to that in whose place it comes.
    """
    near = likeness(looks.first, looks.decode(made), looks.decode(x0)) >= floor
    chosen = near & which
    return torch.where(chosen.view(-1, *[1] * (x0.ndim - 1)), made, x0), chosen.float().mean()
