"""A run's videos beside each other as one picture that moves: what rows of single frames cannot show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill.networks.pictures import strip, to_uint8
from stepdistill.pages.sheets import rows_of_pictures
from stepdistill.pages.videos import save_video

COLUMNS = 4
"""Videos of a row."""
SIDE = 256
"""Pixels of the longer side of a video, at most."""


def strips_and_videos(frames: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """What is kept of frames [B, F, 3, H, W] in [0, 1], some at a time: the strips of all, [B, 3, H, W'], and the first
    COLUMNS with all their frames, small, uint8 [M, F, 3, h, w]."""
    strips, videos, room = list[Tensor](), list[Tensor](), COLUMNS
    for some in frames:
        strips.append(strip(some))
        if room > 0:
            videos.append(_small(some[:room]))
            room -= len(some)
    return torch.cat(strips), torch.cat(videos)


def write_moving(file: Path, rows: Sequence[tuple[str, Tensor]], rate: float) -> None:
    """Writes rows of videos as a .webp that goes round; of pictures nothing.

    Args:
        file: where to.
        rows: of each its label and its videos uint8 [M, F, 3, h, w].
        rate: frames a second.
    """
    count = rows[0][1].shape[1]
    if count > 1:
        frames = [
            rows_of_pictures([(label, videos[:, i]) for label, videos in rows], SIDE // 2)
            for i in range(count)
        ]
        save_video(file, [frames], rate)


def _small(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    shrunk = min(1.0, SIDE / max(height, width))
    if shrunk < 1:
        size = (max(1, round(height * shrunk)), max(1, round(width * shrunk)))
        flat = F.interpolate(frames.flatten(0, 1).float(), size, mode="area")
        frames = flat.unflatten(0, frames.shape[:2])
    return to_uint8(frames)
