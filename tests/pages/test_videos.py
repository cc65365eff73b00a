"""Videos on a grid, as animated pictures and as films with sound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.pages.videos import Sound, check_kind, save_video

COLOURS = ("red", "lime", "blue", "white", "black", "yellow")


def videos() -> list[list[Image.Image]]:
    """Two of six frames: one goes through the colours, the other back."""
    frames = [Image.new("RGB", (33, 20), colour) for colour in COLOURS]
    return [frames, frames[::-1]]


def shown(frame: Any, right: bool) -> list[int]:
    """The colour in the middle of one of two pictures that lie side by side."""
    pixels = np.asarray(frame.convert("RGB"))
    found: list[int] = pixels[pixels.shape[0] // 2, pixels.shape[1] * (3 if right else 1) // 4].tolist()
    return found


def wanted(right: bool) -> list[list[int]]:
    frames = videos()[int(right)]
    return [list(frame.getpixel((0, 0))) for frame in frames]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animated_picture_goes_through_all_frames(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"clip.{kind}"
    save_video(file, videos(), rate=8)
    with Image.open(file) as clip:
        assert (clip.format, clip.n_frames, clip.info["loop"]) == (kind.upper(), 6, 0)  # type: ignore[attr-defined]
        for number in range(6):
            clip.seek(number)
            for right in (False, True):
                assert np.abs(np.array(shown(clip, right)) - wanted(right)[number]).max() <= 8
        clip.seek(1)
        assert clip.info["duration"] in (120, 125)  # a GIF counts in hundredths of a second
    assert list(tmp_path.iterdir()) == [file]


def test_a_film_has_its_frames_and_its_sound(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra `video`)")
    file, rate = tmp_path / "clip.mp4", 16000
    seconds = np.arange(rate) / rate
    both = np.stack([np.sin(2 * np.pi * 440 * seconds), np.sin(2 * np.pi * 880 * seconds)]) / 2
    save_video(file, videos(), rate=6, sound=Sound(both.astype(np.float32), rate))
    with av.open(str(file)) as film:
        assert float(film.streams.video[0].average_rate) == 6
        assert film.streams.video[0].width % 2 == film.streams.video[0].height % 2 == 0
        frames = [frame.to_image() for frame in film.decode(video=0)]
    for right in (False, True):
        found = np.array([shown(frame, right) for frame in frames])
        assert found.shape == (6, 3) and np.abs(found - wanted(right)).max() <= 16
    with av.open(str(file)) as film:
        assert film.streams.audio[0].rate == rate
        heard = np.concatenate([frame.to_ndarray() for frame in film.decode(audio=0)], 1)
    middle = heard[:, rate // 4 : 3 * rate // 4]
    peaks = np.abs(np.fft.rfft(middle)).argmax(1) * rate / middle.shape[1]
    assert np.abs(peaks - [440, 880]).max() <= 4 and 0.4 < np.abs(middle).max() < 0.6


def test_a_film_needs_what_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"mp4 needs PyAV: pip install 'stepdistill\[video\]', or take webp"):
        check_kind(".mp4")
    check_kind(".webp")
