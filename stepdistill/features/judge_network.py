"""The judge's network: a residual convolutional classifier of small pictures, and the words of a caption.

He et al. 2016, "Deep Residual Learning for Image Recognition", 1512.03385, with group norms instead of batch norms (Wu
and He 2018, 1803.08494), so that an image's features depend on that image alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 8
_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")


def words_of(caption: str) -> list[str]:
    """The different words of a caption in their order, in lower case: ``medium-light`` is one."""
    return list(dict.fromkeys(_WORD.findall(caption.lower())))


class _Block(nn.Module):
    """Two convolutions beside a shortcut; half the size: [B, C, H, W] to [B, width, H / 2, W / 2]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(NORM_GROUPS, width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(NORM_GROUPS, width)
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.silu(self.first_norm(self.first(x)))
        inner = self.second_norm(self.second(inner))
        return F.silu(inner + self.shortcut(F.avg_pool2d(x, 2)))


class JudgeNetwork(nn.Module):
    """Images to unit features, and features to what is in the picture.

    Args:
        widths: channels of the stem and of the blocks, each of which halves the size.
        dimension: of the features.
        words: how many words it knows.
        groups: how many groups it sorts pictures into.
    """

    def __init__(self, widths: Sequence[int], dimension: int, words: int, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.GroupNorm(NORM_GROUPS, widths[0])
        self.blocks = nn.Sequential(*map(_Block, widths, widths[1:]))
        self.projection = nn.Linear(widths[-1], dimension)
        self.words = nn.Linear(dimension, words)
        self.groups = nn.Linear(dimension, groups)

    def forward(self, images: Tensor) -> Tensor:
        """Unit features [B, D] of images [B, 3, H, W] in [-1, 1]."""
        x = F.silu(self.stem_norm(self.stem(images)))
        x = self.blocks(x).mean((2, 3))  # [B, C]
        return F.normalize(self.projection(x), dim=1)

    def named(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the words [B, W] and of the groups [B, G] in the sight of features [B, D]."""
        wide = math.sqrt(features.shape[1]) * features  # each of about unit size
        return self.words(wide).log_softmax(1), self.groups(wide).log_softmax(1)
