"""Families that draw from a picture beside the prompt, which names it (stepdistill/pictures/given.py)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from stepdistill.families.base import Family
from stepdistill.families.condition import Condition
from stepdistill.families.size import Size
from stepdistill.pictures.given import pictures_of

PICTURE = "picture"
"""The condition that holds the latents of the picture, as they stand beside a state's."""
NULL = "null_"
"""How the names of conditions begin that guidance starts from in place of those of the rest of the name, where they
depend on the picture."""


class FromPicture(Family):
    """What they share.

    Class attributes:
        of_picture: names of the conditions that are the picture's, and stay under no guidance.
    """

    from_picture = True
    told_size = True
    of_picture: ClassVar[frozenset[str]] = frozenset({PICTURE})

    def latents_of(self, pipe: Any, pictures: list[Image], size: Size) -> Tensor:
        """The latents [B, ...] of pictures of the size that is drawn, as they stand beside a state's."""
        # One by one: of large pictures several together would not be encoded on a common card.
        return torch.cat([self.to_states(pipe, frame[None]) for frame in as_frames(pictures, pipe.device)])

    def shape_of(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """The shape of those of one, without B."""
        return self.state_shape(pipe, size)

    def unguided(self, null: Condition, cond: Condition) -> Condition:
        own = {
            name.removeprefix(NULL): value for name, value in cond.tensors.items() if name.startswith(NULL)
        }
        kept = {name: cond[name] for name in self.of_picture & cond.tensors.keys()}
        return Condition({**null.tensors, **own, **kept})


class TokensBehind(FromPicture):
    """Those whose network sees the tokens of the picture behind those of a state, [B, N + N', D]."""

    def picture(self, net: nn.Module, output: Any, state: tuple[int, ...]) -> Tensor:
        return super().picture(net, output, state)[:, : self.tokens(net, state)]


def pictures_named(prompts: list[str], size: Size) -> list[Image]:
    """The pictures of the prompts at the size of what is drawn, RGB."""
    return pictures_of(prompts, size.height, size.width)


def as_frames(pictures: list[Image], device: torch.device) -> Tensor:
    """Pictures of one size as frames [B, 1, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.movedim(-1, 1)[:, None].to(device, torch.float32) / 127.5 - 1
