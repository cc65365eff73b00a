"""What a pipeline of videos says beside their frames: how fast they go by, and what is heard."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from stepdistill.families.plain_calls import FRAMES
from stepdistill.pages.videos import Sound

FRAME_RATE = 16.0
"""Frames a second of videos whose pipeline says nothing."""


def draws_videos(pipe: Any) -> bool:
    """Whether the pipeline's call takes a number of frames."""
    return not FRAMES.isdisjoint(inspect.signature(pipe.__call__).parameters)


def frame_rate(pipe: Any) -> float:
    """Frames a second."""
    told = inspect.signature(pipe.__call__).parameters.get("frame_rate")
    return float(told.default) if told and isinstance(told.default, int | float) else FRAME_RATE


def sounds_of(pipe: Any, beside: Sequence[Any]) -> list[Sound]:
    """The sound of each video; of a pipeline without, nothing.

    Args:
        pipe: the pipeline.
        beside: what its call returned after the videos.
    """
    rate = getattr(getattr(pipe, "vocoder", None), "config", {}).get("output_sampling_rate")
    if rate is None or not beside or not isinstance(beside[0], torch.Tensor):
        return []
    waves = beside[0].float().cpu()
    return [Sound(wave.reshape(-1, wave.shape[-1]).numpy(), int(rate)) for wave in waves]
