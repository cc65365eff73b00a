"""Images with captions to train on: the embedded ones, or a folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stepdistill.data.captions import caption_of, printable, read_metadata
from stepdistill.data.image_decoding import decode
from stepdistill.data.image_names import ENDINGS, is_image
from stepdistill.data.image_sources import Skipped, decode_files
from stepdistill.data.texts import rows_sha256
from stepdistill.errors import UserError
from stepdistill.system.emoji import emoji_captions, emoji_images


class Images(Protocol):
    """Images with captions."""

    @property
    def captions(self) -> list[str]: ...

    def sha256(self) -> str:
        """Of the list of images with their captions."""
        ...

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class EmbeddedImages:
    """The images the embedded teacher was trained on.

    Attributes:
        pixels: uint8 [N, H, W, 3].
        captions: one for each.
    """

    pixels: Tensor
    captions: list[str]

    @staticmethod
    def read() -> EmbeddedImages:
        """The embedded emoji."""
        return EmbeddedImages(torch.from_numpy(emoji_images()), emoji_captions())

    def sha256(self) -> str:
        return rows_sha256([*self.captions, hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()])

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; they come in one size only."""
        if self.pixels.shape[1:3] != (height, width):
            raise UserError(
                f"the embedded images are {tuple(self.pixels.shape[1:3])}, the teacher draws {height, width}"
            )
        return self.pixels[list(index)].permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class ImageFolder:
    """Image files with captions, read by the rules of ``image_sources``, but turned upright.

    Attributes:
        folder: where they lie.
        files: usable images, sorted by name.
        captions: one for each, see ``captions``.
        skipped: files that look like images and are not used, with the reason.
        converted: what was done to the used ones, with their number.
        sources: where captions came from, with their number.
    """

    folder: Path
    files: list[Path]
    captions: list[str]
    skipped: list[Skipped]
    converted: Counter[str]
    sources: Counter[str]

    @staticmethod
    def read(folder: Path) -> ImageFolder:
        """Looks through a folder and all below it.

        Raises:
            UserError: when the folder is missing or holds no usable image, or a file of captions is no such.
        """
        if not folder.is_dir():
            raise UserError(f"data.images: {folder} is not a folder: give one with images")
        stated = read_metadata(folder)
        found = sorted(
            path
            for path in folder.rglob("*")
            if is_image(path.relative_to(folder).as_posix()) and path.is_file()
        )
        files, captions, skipped = [], [], []
        converted, sources = Counter[str](), Counter[str]()
        for file, (name, pixels, notes) in zip(found, decode_files(folder, found, upright=True), strict=True):
            if pixels is None:
                skipped.append(Skipped(printable(name), "; ".join(notes)))
            elif (caption := caption_of(file, stated)) is None:
                skipped.append(
                    Skipped(printable(name), "its name is not UTF-8, and there is no other caption")
                )
            else:
                files.append(file)
                captions.append(caption.text)
                sources[caption.source] += 1
                converted.update(notes)
        if not files:
            raise UserError(
                f"data.images: {folder} holds no usable image of {', '.join(sorted(ENDINGS))} ({len(skipped)} skipped"
                + (f": {skipped[0].name} {skipped[0].reason})" if skipped else ")")
            )
        return ImageFolder(folder, files, captions, skipped, converted, sources)

    def sha256(self) -> str:
        """Of names, sizes in bytes and captions, in their order."""
        named = [(file.relative_to(self.folder).as_posix(), file.stat().st_size) for file in self.files]
        return rows_sha256([(*each, caption) for each, caption in zip(named, self.captions, strict=True)])

    def remarks(self, most: int = 5) -> list[str]:
        """Lines that say where captions came from, what was converted and what was skipped, naming the first."""
        origins = ", ".join(f"{count} from {source}" for source, count in self.sources.items())
        lines = [f"data.images: {len(self.files)} images, captions: {origins}"]
        lines += [f"data.images: {count} images: {what}" for what, count in sorted(self.converted.items())]
        if self.skipped:
            names = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:most])
            more = "; ..." if len(self.skipped) > most else ""
            lines.append(f"data.images: {len(self.skipped)} files skipped: {names}{more}")
        return lines

    def load(self, index: Sequence[int], height: int, width: int) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]: centre-cropped to the aspect ratio and resized with Lanczos.

        Raises:
            UserError: when a file was altered since and cannot be used any more.
        """
        rows = []
        for i in index:
            file = self.files[i]
            name, pixels, notes = decode(str(file), file.read_bytes, (height, width), upright=True)
            if pixels is None:
                raise UserError(
                    f"data.images: {name} was usable at the start of the run and {'; '.join(notes)}"
                )
            rows.append(torch.tensor(pixels).permute(2, 0, 1))
        return torch.stack(rows).float() / 127.5 - 1
