"""What is drawn: pixels, and frames of a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STATES_AT_ONCE = 2**18
"""Numbers of the states that go through a network without a graph together: 4 of SDXL's at 1024 x 1024."""
DECODED_AT_ONCE = 2**16
"""The same of what is decoded, which takes gigabytes for one of those."""


def at_once(shape: Sequence[int], numbers: int, most: int) -> int:
    """How many states of a shape [C, ...] are worked on together: as many as have so many numbers, 1 to ``most``."""
    return max(1, min(most, numbers // math.prod(shape)))


@dataclass(frozen=True)
class Size:
    """What is drawn, in pixels and frames; a picture has one frame."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        picture = f"{self.height}x{self.width}"
        return picture if self.frames == 1 else f"{picture}, {self.frames} frames"
