"""How much videos move."""

from __future__ import annotations

from torch import Tensor


def changes(frames: Tensor) -> Tensor:
    """The root mean square change from one frame to the next, of each video, [N], of frames [N, F, ...], F > 1."""
    found: Tensor = frames.float().diff(dim=1).square().flatten(1).mean(1).sqrt()
    return found


def frames_of_strips(strips: Tensor, shown: int) -> Tensor:
    """Frames in [0, 1], [N, ``shown``, 3, H, W], of uint8 [N, 3, H, ``shown`` W] in which they are side by side."""
    frames: Tensor = (strips.float() / 255).unflatten(3, (shown, -1)).movedim(3, 1)
    return frames
