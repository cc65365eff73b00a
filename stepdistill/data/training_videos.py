"""Videos with captions, of which a teacher of videos learns: a folder of files, each decoded when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepdistill.data.captions import printable
from stepdistill.data.image_names import of_macos
from stepdistill.data.texts import rows_sha256
from stepdistill.data.training_images import CaptionedFiles, ImageFolder, ImageTars, find_images
from stepdistill.data.video_decoding import FORMATS, check_reader, decode_video
from stepdistill.errors import UserError
from stepdistill.pictures.decoding import Decoded, Nearest
from stepdistill.system.prefetch import ahead


@dataclass(frozen=True)
class VideoFolder:
    """Video files with captions, see ``video_decoding``.

    Attributes:
        files: where they lie.
        frames: how many are taken from the middle of each.
        rate: how many of them a second; None takes every frame.
    """

    files: CaptionedFiles
    frames: int
    rate: float | None
    noun = "video"

    @staticmethod
    def read(folder: Path, frames: int, rate: float | None) -> VideoFolder:
        """Looks through a folder and all below it, and opens no video.

        Raises:
            UserError: when it holds none, a file of captions is no such, or nothing is installed that reads videos.
        """
        check_reader()
        if not folder.is_dir():
            raise UserError(f"data.images: {folder} is not a folder: give one with videos")
        found = CaptionedFiles.read(folder, is_video)
        if not len(found.names):
            raise UserError(
                f"data.images: {folder} holds no video of {', '.join(sorted(FORMATS))}, and the teacher draws videos"
            )
        return VideoFolder(found, frames, rate)

    @property
    def captions(self) -> Sequence[str]:
        """One for each."""
        return self.files.captions

    def sha256(self) -> str:
        """Of names, sizes in bytes, captions, and which frames are taken."""
        return rows_sha256([self.files.sha256(), str(self.frames), str(self.rate)])

    def decoded(self, numbers: Sequence[int], sizes: Nearest) -> Iterator[Decoded]:
        return ahead(map(lambda number: self._decoded(number, sizes), numbers), depth=2)

    def _decoded(self, number: int, sizes: Nearest) -> Decoded:
        name = self.files.names[number]
        return decode_video(printable(name), self.files.folder / name, self.frames, self.rate, sizes)

    def remarks(self) -> list[str]:
        """Lines that say where captions came from, what is taken of each, and what is left out."""
        taken = "every frame" if self.rate is None else f"{self.rate:g} frames a second"
        first, *more = self.files.remarks(self.noun)
        return [f"{first}; the middle {self.frames} frames of each, {taken}", *more]


def examples_of(place: Path, frames: int, rate: float | None) -> ImageFolder | ImageTars | VideoFolder:
    """What a teacher of pictures, or of so many frames, learns from.

    Args:
        place: where it lies.
        frames: that the teacher draws.
        rate: frames a second of videos.

    Raises:
        UserError: there is none.
    """
    return VideoFolder.read(place, frames, rate) if frames > 1 else find_images(place)


def is_video(name: str) -> bool:
    """Whether a file's name is that of a video."""
    return Path(name).suffix.lower() in FORMATS and not of_macos(name)
