"""Rules about pictures on white: how much of one is inked, and how much of that has the hue that its caption names.

No network has a part in them, so that what they say of a picture is true. Steps are soft, so that they have gradients
wherever a pixel stands. The numbers are start values of ours, the hues those of the embedded images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

HUES = {
    "red": 3.0,
    "orange": 36.0,
    "yellow": 48.0,
    "green": 89.0,
    "blue": 207.0,
    "purple": 292.0,
    "pink": 337.0,
    "brown": 14.0,
}
"""Degrees of the hues that captions name; brown is a darker one."""
NOUNS = ("circle", "square", "heart", "book", "diamond", "triangle", "apple")
"""What is of one colour, the one its caption names."""
WIDTH = 20.0
"""Concentration of the window about a hue: half its height is 15 degrees away."""
NO_COLOUR = math.nan
UNTRUE = ("black", "white", "grey", "button", "small red")
"""Words of captions whose picture has another colour than they name: buttons, and orange triangles."""


def hue_of(caption: str) -> float:
    """The hue in degrees that a caption names of a thing of one colour; NO_COLOUR where it names none, or several."""
    words, said = re.findall("[a-z]+", caption.lower()), caption.lower()
    named = [HUES[word] for word in words if word in HUES]
    thing = any(word in NOUNS for word in words)
    return named[0] if len(named) == 1 and thing and not any(word in said for word in UNTRUE) else NO_COLOUR


def hues_of(captions: Sequence[str]) -> Tensor:
    """:func:`hue_of` each, [B]."""
    return torch.tensor([hue_of(caption) for caption in captions])


def inked(images: Tensor) -> Tensor:
    """How far each pixel of images [B, 3, H, W] in [0, 1] is from white: in [0, 1], [B, H, W]."""
    return torch.tanh((1 - images.amin(1)) / 0.25)


def ink(images: Tensor) -> Tensor:
    """The share of images [B, 3, H, W] in [0, 1] that is not white, [B]."""
    return inked(images).mean(dim=(1, 2))


def hue_share(images: Tensor, hue: Tensor) -> Tensor:
    """The share of the ink of images [B, 3, H, W] in [0, 1] that has the hue [B] in degrees: in [0, 1], [B]."""
    red, green, blue = images.unbind(1)
    across, up = red - (green + blue) / 2, math.sqrt(0.75) * (green - blue)
    chroma = (across.square() + up.square() + 1e-6).sqrt()  # [B, H, W]
    angle = torch.deg2rad(hue)[:, None, None]
    towards = (across * torch.cos(angle) + up * torch.sin(angle)) / chroma  # the cosine between the two hues
    window = torch.exp(WIDTH * (towards - 1)) * torch.tanh(chroma / 0.1)
    dark = torch.sigmoid((0.85 - images.amax(1)) / 0.05)
    wanted = torch.where((hue == HUES["brown"])[:, None, None], dark, torch.ones_like(dark))
    weight = inked(images)
    return (window * wanted * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(1e-6)
