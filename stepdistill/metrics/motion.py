"""How much videos move."""

from __future__ import annotations

from torch import Tensor


def changes_of_strips(strips: Tensor, shown: int) -> Tensor:
    """The root mean square change of values in [0, 1] from one shown frame to the next, of each video, [N].

    Args:
        strips: uint8 [N, 3, H, ``shown`` W], the frames of each video side by side.
        shown: how many frames those are, at least 2.
    """
    frames = (strips.float() / 255).unflatten(3, (shown, -1))  # [N, 3, H, shown, W]
    changes: Tensor = frames.diff(dim=3).square().flatten(1).mean(1).sqrt()
    return changes
