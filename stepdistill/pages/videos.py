"""Videos laid out on a grid and written: as an animated picture, or as an mp4 file, with sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from stepdistill.errors import UserError
from stepdistill.pages.sheets import grid
from stepdistill.system.files import written_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANIMATED = (".webp", ".gif")
FILM = ".mp4"


@dataclass(frozen=True)
class Sound:
    """What is heard of a video.

    Attributes:
        samples: float32 in [-1, 1], one or two channels [C, N].
        rate: samples a second.
    """

    samples: NDArray[Any]
    rate: int


def check_kind(ending: str) -> None:
    """Files of this ending can be written, if they are of videos.

    Raises:
        UserError: what writes mp4 is not installed.
    """
    if ending.lower() == FILM:
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError("mp4 needs PyAV: pip install 'stepdistill[video]', or take webp or gif") from None


def save_video(
    path: Path, videos: Sequence[Sequence[Image.Image]], rate: float, sound: Sound | None = None
) -> None:
    """Writes a video as it is, or several of one length on a near-square grid, in the format of the file's ending.

    Args:
        path: a .gif or .webp, which goes round, or an .mp4 of H.264 and AAC.
        videos: of each its frames.
        rate: frames a second.
        sound: of an .mp4.
    """
    frames = (
        list(videos[0]) if len(videos) == 1 else [grid(list(shown)) for shown in zip(*videos, strict=True)]
    )
    with written_whole(path) as temporary:
        if path.suffix.lower() == FILM:
            _save_film(temporary, frames, rate, sound)
        else:
            kind = path.suffix.lower().removeprefix(".")
            length = round(1000 / rate)
            frames[0].save(temporary, kind, save_all=True, append_images=frames[1:], duration=length, loop=0)


def _save_film(path: Path, frames: Sequence[Image.Image], rate: float, sound: Sound | None) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w", format="mp4") as film:
        seen: Any = film.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        seen.width, seen.height = (side + side % 2 for side in frames[0].size)  # as its colours take
        seen.pix_fmt, seen.options = "yuv420p", {"crf": "18"}
        layout = "mono" if sound and len(sound.samples) == 1 else "stereo"
        heard: Any = film.add_stream("aac", rate=sound.rate, layout=layout) if sound else None
        for frame in frames:
            whole = Image.new("RGB", (seen.width, seen.height), "white")
            whole.paste(frame)
            film.mux(seen.encode(av.VideoFrame.from_image(whole)))
        film.mux(seen.encode())
        if sound:
            samples = np.ascontiguousarray(sound.samples, dtype=np.float32)
            whole_sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            whole_sound.sample_rate = sound.rate
            film.mux(heard.encode(whole_sound))
            film.mux(heard.encode())
