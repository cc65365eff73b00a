"""Decoded numbers to pixels."""

from __future__ import annotations

from torch import Tensor

LEAK = 0.1
"""Slope beyond black and white, for gradients alone: a loss of a saturated pixel can still bring it back."""


def unit_pixels(decoded: Tensor) -> Tensor:
    """Numbers in about [-1, 1] to [0, 1], clamped; to a gradient the clamp is soft."""
    pixels = decoded.float() / 2 + 0.5
    clamped = pixels.clamp(0, 1)
    if not clamped.requires_grad:
        return clamped
    beyond = pixels - clamped
    return clamped + LEAK * (beyond - beyond.detach())
