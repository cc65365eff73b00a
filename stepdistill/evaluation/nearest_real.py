"""The real images nearest to drawn ones in feature space: a picture that is almost one of them was memorised."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.data.image_archives import open_images
from stepdistill.errors import UserError
from stepdistill.evaluation.reference_files import Reference
from stepdistill.system.emoji import emoji_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SPREAD = 500
"""Real images, evenly spaced in their order, whose distance to the nearest other real image is measured."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest real images of each of Q images.

    Attributes:
        indices: [Q, k] int64, places in the reference's features, nearest first.
        distances: [Q, k] float64, Euclidean distances of features.
    """

    indices: Tensor
    distances: Tensor


def nearest(features: Tensor, real: Tensor, count: int, *, own: Tensor | None = None) -> Neighbours:
    """The ``count`` nearest of the real features.

    Args:
        features: [Q, D].
        real: [M, D].
        count: k, at most M (less one with ``own``).
        own: [Q] places of the images themselves among the real ones, which do not count.
    """
    features = features.detach().cpu().double()
    blocks = [torch.cdist(features, block.detach().cpu().double()) for block in real.split(4096)]
    distances = torch.cat(blocks, 1)  # [Q, M]
    if own is not None:
        distances[torch.arange(len(own)), own] = torch.inf
    found = distances.topk(count, largest=False)
    return Neighbours(found.indices, found.values)


def between_real(real: Tensor) -> Tensor:
    """Distances [min(M, SPREAD)] of real images to their nearest other real image, M at least 2."""
    own = torch.linspace(0, len(real) - 1, min(len(real), SPREAD)).round().long()
    return nearest(real[own], real, 1, own=own).distances[:, 0]


def real_images(reference: Reference, wanted: Collection[int]) -> dict[int, NDArray[np.uint8]]:
    """The reference's real images [H, W, 3] of some places, in the order of its features.

    That they are the very images is made sure of: the embedded ones by their number, others by the hash of all their
    pixels, which statistics of ``stepdistill stats`` have.

    Raises:
        UserError: they are not at hand, or are not the images of these features.
    """
    source, expected = str(reference.protocol.get("images", "")), reference.protocol.get("pixels_sha256")
    count = reference.moments.count
    if source == "emoji" and expected is None:  # not a folder of that name
        every = emoji_images()
        if len(every) != count:
            raise UserError(f"the reference is of {count} images, embedded are {len(every)}")
        return {i: every[i] for i in wanted}
    if expected is None:
        raise UserError("the reference does not say which images it is made of")
    if not Path(source).expanduser().exists():
        raise UserError(f"the reference's images {source} are not there")
    opened = open_images(source, resolution=int(reference.protocol.get("resolution", 0)))
    found, sizes = {}, set()
    for i, (_, pixels) in enumerate(opened):
        sizes.add(pixels.shape)
        if i in wanted:
            found[i] = pixels
    if opened.used != count or opened.pixels_sha256() != expected:
        raise UserError(f"the images of {source} are not those that the reference was made of")
    if len(sizes) > 1:  # features of equal sizes were computed together
        raise UserError(f"the images of {source} have several sizes: their features are in another order")
    return found
