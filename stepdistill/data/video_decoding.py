"""The middle of a video file as frames of 8-bit RGB, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from stepdistill.errors import UserError
from stepdistill.pictures.decoding import Decoded, Refused, Size, fit, unreadable

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = MappingProxyType(
    {".mp4": "mov", ".mov": "mov", ".m4v": "mov", ".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}
)
"""FFmpeg's reader of each ending. It is told, and not found by the content: that of a playlist opens other files."""


def check_reader() -> None:
    """Videos can be read.

    Raises:
        UserError: what reads them is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("data.images: videos are read by PyAV: pip install 'stepdistill[video]'") from None


def decode_video(name: str, file: Path, frames: int, rate: float | None, size: Size) -> Decoded:
    """The frames uint8 [F, H, W, 3] in the middle of a video, upright, or the reason why not, whatever is wrong.

    Args:
        name: as results call it.
        file: where it lies.
        frames: how many, F.
        rate: how many of them a second, of each the nearest of the video's own; None takes every frame.
        size: of each frame, see :func:`stepdistill.pictures.decoding.fit`.
    """
    import av

    try:
        with file.open("rb") as content, av.open(content, format=FORMATS[file.suffix.lower()]) as video:
            return Decoded(name, *_middle(video, frames, rate, size))
    except Refused as refused:
        return Decoded(name, None, (str(refused),))
    except Exception as error:  # a damaged file can raise anything in a decoder
        return Decoded(name, None, (unreadable(error),))


def _middle(
    video: Any, count: int, rate: float | None, size: Size
) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    if not video.streams.video:
        raise Refused("has no pictures that move: no video stream")
    stream = video.streams.video[0]
    stream.thread_type = "AUTO"
    if not (own := float(stream.average_rate or stream.guessed_rate or 0)):
        raise Refused("does not say how many frames it has a second")
    rate = rate or own
    frames = video.decode(stream)
    if (head := next(frames, None)) is None:
        raise Refused("has no frames")
    first = float(head.time)  # of some files not what their headers say
    frames = chain([head], frames)
    length = _seconds(video, stream, first)
    start = max(0.0, (length - count / rate) / 2)
    start = round(start * own) / own  # at a frame of its own
    if start > 0:
        video.seek(int((first + start) / stream.time_base), stream=stream)
        frames = video.decode(stream)
    chosen: list[NDArray[np.uint8]] = []
    notes: tuple[str, ...] = ()
    for frame in _nearest(frames, first, [start + i / rate for i in range(count)], own):
        turns = round(frame.rotation / 90) % 4
        turned = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        pixels, notes = fit(turned, size, ("turned upright",) if turns else ())
        chosen.append(pixels)
    if len(chosen) < count:
        raise Refused(
            f"has {len(chosen)} of the {count} frames at {rate:g} a second that are wanted; it is {length:.2f} s long"
        )
    if abs(rate / own - 1) > 0.01:
        notes = (f"taken at {rate:g} frames a second", *notes)
    return np.stack(chosen), notes


def _seconds(video: Any, stream: Any, first: float) -> float:
    """How long a video is whose first frame stands at ``first``."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    whole = float((video.duration or 0) / 1_000_000)
    return (
        whole - first if "matroska" in video.format.name else whole
    )  # which counts from 0, whatever begins when


def _nearest(frames: Iterator[Any], first: float, times: list[float], own: float) -> Iterator[Any]:
    """Of each time the frame that is nearest to it; fewer where the video ends before.

    Args:
        frames: of a video, in order; some may come before the first of the times.
        first: when the video begins.
        times: in seconds from there, ascending.
        own: frames a second.
    """
    before, wanted = None, iter(times)
    time = next(wanted, None)
    for frame in frames:
        now = float(frame.time) - first
        while time is not None and now >= time:
            # Of two that are as near, the one before.
            earlier = before is not None and time - (float(before.time) - first) < now - time + 1e-6
            yield before if earlier else frame
            time = next(wanted, None)
        if time is None:
            return
        before = frame
    while before is not None and time is not None and time - (float(before.time) - first) < 1 / own:
        yield before
        time = next(wanted, None)
