"""What is drawn: pixels, and frames of a video."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What is drawn, in pixels and frames; a picture has one frame."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        picture = f"{self.height}x{self.width}"
        return picture if self.frames == 1 else f"{picture}, {self.frames} frames"
