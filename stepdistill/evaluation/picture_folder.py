"""A folder of drawn pictures that stats, eval, training and outside tools read: one PNG a picture, and an index.

    FOLDER/000000.png ...   picture i; or 000000.mp4 ..., a video
    FOLDER/metadata.jsonl   {"file_name", "prompt", "seed"}, a line a picture, with "input_image" where it was drawn
                            from one; as image folders of Hugging Face have it
    FOLDER/drawn.json       what drew them

A folder that was begun is finished: pictures that are there are kept. The index is written when all are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.pictures.given import row_of
from stepdistill.system.files import check_writable, written_whole
from stepdistill.system.parsing import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from stepdistill.pages.videos import Sound

SETTINGS = "drawn.json"
INDEX = "metadata.jsonl"
SAVERS = 4
"""Threads that write pictures."""


class PictureFolder:
    """Pictures by their number, from 0.

    Args:
        folder: where they lie; made when they are claimed.
        prompts: one a picture; None for pipelines that take none.
        seeds: one a picture.
        settings: all that the pictures depend on, for JSON. Their number is no part of it: a folder may grow.
        ending: of their files' names.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        ending: str = "png",
    ) -> None:
        self.folder, self.prompts, self.seeds, self._ending = folder, prompts, seeds, ending
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def claim(self) -> None:
        """Marks the folder as theirs.

        Raises:
            UserError: it holds other pictures or other files, or cannot be written.
        """
        begun = read_settings(self.folder, SETTINGS)
        refuse_other(self.folder, begun, self.settings)
        check_writable(self.folder)
        if begun is None:
            write_text(self.folder / SETTINGS, json.dumps(self.settings, indent=1) + "\n")

    def file(self, number: int) -> Path:
        """Where a picture lies, or will lie."""
        return self.folder / f"{number:06}.{self._ending}"

    def missing(self) -> list[int]:
        """The numbers of the pictures that are not there."""
        return [number for number in range(len(self.seeds)) if not self.file(number).is_file()]

    def index(self) -> None:
        """Writes metadata.jsonl, when all pictures are there."""
        prompts = self.prompts
        rows = (
            {"file_name": self.file(i).name} | (row_of(prompts[i]) if prompts else {}) | {"seed": seed}
            for i, seed in enumerate(self.seeds)
        )
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(self.folder / INDEX, text)

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Pictures uint8 [B, 3, H, W].

        Raises:
            UserError: one is damaged.
        """
        import numpy as np
        import torch
        from PIL import Image, UnidentifiedImageError

        found = []
        for number in numbers:
            try:
                with Image.open(self.file(number)) as image:
                    found.append(torch.from_numpy(np.array(image.convert("RGB"))))
            except (OSError, UnidentifiedImageError):
                raise UserError(f"{self.file(number)} is damaged: remove it, and it is drawn again") from None
        return torch.stack(found).movedim(-1, 1)


class Saver:
    """Writes pictures in threads of its own, while the next ones are drawn."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._under_way = pool, list[Future[None]]()

    def put(self, file: Path, picture: NDArray[Any]) -> None:
        """Writes a picture uint8 [H, W, 3] by and by. A picture that is there is whole."""
        self._under_way.append(self._pool.submit(_save, file, picture))

    def put_video(self, file: Path, frames: NDArray[Any], rate: float, sound: Sound | None = None) -> None:
        """Writes a video uint8 [F, H, W, 3] by and by, as :func:`stepdistill.pages.videos.save_video` does."""
        self._under_way.append(self._pool.submit(_save_video, file, frames, rate, sound))

    def settle(self) -> None:
        """Waits for what is under way; what failed is raised."""
        for picture in self._under_way:
            picture.result()
        self._under_way.clear()


@contextmanager
def saver() -> Iterator[Saver]:
    """A Saver; when the block ends all of its pictures are there."""
    with ThreadPoolExecutor(SAVERS) as pool:
        made = Saver(pool)
        yield made
        made.settle()


def read_settings(folder: Path, name: str) -> dict[str, Any] | None:
    """The settings of what a folder holds; None where it is new or empty.

    Args:
        folder: to be written to.
        name: of the file that holds the settings.

    Raises:
        UserError: it is a file, or a folder that holds something else, or its settings are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    file = folder / name
    if file.is_file():
        try:
            return dict(parse_json(file.read_text("utf-8")))
        except (TypeError, ValueError):
            raise UserError(f"{file} is damaged: remove {folder}, or give another folder") from None
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files (it has no {name}): give a new folder")
    return None


def refuse_other(folder: Path, begun: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """What a folder holds was drawn with the same settings, or it holds nothing.

    Raises:
        UserError: it was drawn with others.
    """
    other = [key for key, value in settings.items() if begun is not None and begun.get(key) != value]
    if begun is not None and other:
        told = ", ".join(
            f"other {key.removesuffix('_sha256')}"
            if key.endswith("_sha256")
            else f"{key} {begun.get(key)}, not {settings[key]}"
            for key in other
        )
        raise UserError(f"{folder} holds pictures with {told}: give another folder")


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with written_whole(file) as temporary:
        temporary.write_text(text, "utf-8")


def _save(file: Path, picture: NDArray[Any]) -> None:
    """The fastest compression loses nothing either."""
    from PIL import Image

    with written_whole(file) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", compress_level=1)


def _save_video(file: Path, frames: NDArray[Any], rate: float, sound: Sound | None) -> None:
    from PIL import Image

    from stepdistill.pages.videos import save_video

    save_video(file, [[Image.fromarray(frame) for frame in frames]], rate, sound)
