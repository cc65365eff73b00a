"""Videos that a teacher of videos learns from: which frames are taken, upright, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.data.batches import Data
from stepdistill.data.training_videos import VideoFolder
from stepdistill.data.video_decoding import decode_video
from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.decoding import Decoded, Nearest

WHOLE = Nearest(((16, 32),))


def film(file: Path, greys: Sequence[int], rate: int = 10, turn: int = 0, left: int = 0) -> Path:
    """Frames of one grey each, 16 x 32, whose left half is brighter by so much."""
    with av.open(str(file), "w") as made:
        stream = made.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = 32, 16, "yuv444p", {"crf": "1"}
        if turn:
            stream.set_display_rotation(turn)
        for grey in greys:
            pixels = np.full((16, 32, 3), grey, np.uint8)
            pixels[:, :16] += left
            made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(stream.encode())
    return file


def greys_of(found: Decoded) -> list[int]:
    assert found.pixels is not None, found.notes
    return [round(float(frame.mean()) / 8) for frame in found.pixels]


def test_frames_are_the_middle_ones_at_the_asked_rate(tmp_path: Path) -> None:
    """Frame i of 21 has grey 8 i."""
    for name in ("a.mp4", "a.mkv", "a.avi", "a.mov"):
        file = film(tmp_path / name, range(0, 168, 8))
        found = decode_video("a", file, 5, None, WHOLE)
        assert greys_of(found) == [8, 9, 10, 11, 12] and found.notes == ()
        slower = decode_video("a", file, 4, 5.0, WHOLE)
        assert greys_of(slower) == [6, 8, 10, 12] and slower.notes == ("taken at 5 frames a second",)
        assert greys_of(decode_video("a", file, 21, None, WHOLE)) == list(range(21))
        assert greys_of(decode_video("a", file, 8, 20.0, WHOLE)) == [8, 8, 9, 9, 10, 10, 11, 11]
    small = decode_video("a", file, 2, None, Nearest(((8, 8),)))
    assert small.pixels is not None and small.pixels.shape == (2, 8, 8, 3) and "8x8" in small.notes[0]


def test_the_last_frame_stands_until_it_would_have_ended(tmp_path: Path) -> None:
    """The last of eleven frames at 10.5 a second is 0.952 s in, behind the last of ten, which ends at 1 s; at 9.9 it is
    1.01 s in, where there is none."""
    file = film(tmp_path / "a.mp4", range(0, 80, 8))
    assert greys_of(decode_video("a", file, 11, 10.5, WHOLE)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert greys_of(decode_video("a", file, 21, 20.6, WHOLE))[-2:] == [9, 9]
    late = decode_video("a", file, 11, 9.9, WHOLE)
    assert late.pixels is None and "has 10 of the 11 frames at 9.9 a second" in late.notes[0]


def test_a_video_that_begins_late_has_its_own_middle(tmp_path: Path) -> None:
    """Its first frame is 3 s in, as of a stream that was cut; what it has of length is said from 0."""
    for late in (0, 30):
        with av.open(str(tmp_path / f"{late}.mkv"), "w") as made:
            stream = made.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt, stream.options = 32, 16, "yuv444p", {"crf": "1"}
            for i in range(21):
                frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 8 * i, np.uint8), format="rgb24")
                frame.pts, frame.time_base = late + i, Fraction(1, 10)
                made.mux(stream.encode(frame))
            made.mux(stream.encode())
    with av.open(str(tmp_path / "30.mkv")) as video:
        assert float(next(video.decode(video=0)).time) == pytest.approx(3.0, abs=0.01)
    for count, rate in ((21, None), (3, None), (4, 5.0), (23, 10.5)):
        own, same = (decode_video("a", tmp_path / f"{late}.mkv", count, rate, WHOLE) for late in (30, 0))
        assert greys_of(own) == greys_of(same)


def test_what_was_filmed_upright_is_turned_upright(tmp_path: Path) -> None:
    """A quarter turn clockwise is what the file asks for: the left half becomes the upper one."""
    with av.open(str(film(tmp_path / "a.mp4", [40] * 3, turn=-90, left=120))) as video:
        assert next(video.decode(video=0)).rotation == -90  # counter-clockwise
    found = decode_video("a", tmp_path / "a.mp4", 2, None, Nearest(((32, 16),)))
    assert found.pixels is not None and found.pixels.shape == (2, 32, 16, 3)
    assert found.pixels[:, :12].min() > 130 and found.pixels[:, 20:].max() < 70
    assert found.notes == ("turned upright",)


def test_what_cannot_be_used_is_named_with_its_reason(tmp_path: Path) -> None:
    short, sound = film(tmp_path / "short.mp4", [0, 8, 16, 24]), tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as made:
        stream = made.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        made.mux(stream.encode(frame))
        made.mux(stream.encode())
    whole = film(tmp_path / "whole.mp4", [0] * 8)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:300])
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{whole}\n#EXT-X-ENDLIST\n")
    for file, reason in (
        (short, "has 4 of the 5 frames at 10 a second that are wanted; it is 0.40 s long"),
        (sound, "no video stream"),
        (tmp_path / "cut.mp4", "cannot be read"),
        (tmp_path / "list.mp4", "cannot be read"),
    ):
        found = decode_video(file.name, file, 5, None, WHOLE)
        assert found.pixels is None and reason in found.notes[0], found.notes


def test_latents_are_those_of_the_frames_and_batches_have_their_captions(tmp_path: Path) -> None:
    """Also a video that is too short is skipped and named."""
    teacher = PipelineTeacher(tiny_pipeline("wan"), size=Size(16, 32, 5))
    for name, start in (("a_red_heart", 0), ("a_dog", 100)):
        film(tmp_path / f"{name}.mp4", range(start, start + 60, 6))
    film(tmp_path / "short.mp4", [0, 1])
    (tmp_path / "a_dog.txt").write_text("a dog that runs")
    videos = VideoFolder.read(tmp_path, 5, None)
    assert list(videos.captions) == ["a dog that runs", "a red heart", "short"]
    data = Data(teacher, ["a tree"], 0, videos)
    assert data.skipped == 1
    assert "1 files skipped: short.mp4: has 2 of the 5 frames" in data.remarks()[-1]
    images = data.batch(0, 0, 2, 2).images
    assert images is not None and images.x0.shape == (2, *teacher.codec.shape)
    for i, number in enumerate(images.number.tolist() if images.number is not None else ()):
        pixels = decode_video("", videos.files.folder / videos.files.names[number], 5, None, WHOLE).pixels
        frames = torch.tensor(pixels).movedim(-1, -3)[None].float() / 127.5 - 1
        assert (teacher.codec.to_states(frames)[0] - images.x0[i]).abs().max() < 1e-5
    other = VideoFolder.read(tmp_path, 5, 8.0)
    assert other.sha256() != videos.sha256() and "middle 5 frames of each, 8 frames" in other.remarks()[0]


def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no video of \.avi, .*, and the teacher draws videos"):
        VideoFolder.read(tmp_path, 5, None)
