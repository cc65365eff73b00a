"""Real images with captions: the embedded ones, a folder of files, or webdataset tars; decoded when they are asked for.

Of a file its name, or its place in a tar, and its caption are held; images are decoded once, in order, in worker
processes, on their way to their latents (``latents.py``). Those that cannot be used are skipped there, and named.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, overload

import torch
from torch import Tensor

from stepdistill.data.captions import caption_of, printable, read_metadata
from stepdistill.data.image_names import ENDINGS, is_image, natural
from stepdistill.data.image_sources import Skipped, decode_all
from stepdistill.data.prompts import DAMAGE, BadRow, caption_in, is_tar, webdataset
from stepdistill.data.texts import Texts, opened, rows_sha256
from stepdistill.errors import UserError
from stepdistill.pictures.decoding import LARGEST_FILE, Decoded, Entry, Nearest, Refused
from stepdistill.system.emoji import emoji_captions, emoji_images


class Images(Protocol):
    """Images or videos with captions, one for each; not all may turn out to be usable.

    Attributes:
        noun: what one of them is.
    """

    noun: str

    @property
    def captions(self) -> Sequence[str]: ...

    def sha256(self) -> str:
        """Of the list of images with their captions."""
        ...

    def decoded(self, numbers: Sequence[int], sizes: Nearest) -> Iterator[Decoded]:
        """Those images [H, W, 3], or videos [F, H, W, 3], each in one of the sizes, upright, or why it cannot be
        used."""
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
    noun = "image"

    @staticmethod
    def read() -> EmbeddedImages:
        """The embedded emoji."""
        return EmbeddedImages(torch.from_numpy(emoji_images()), emoji_captions())

    def sha256(self) -> str:
        return rows_sha256([*self.captions, hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()])

    def decoded(self, numbers: Sequence[int], sizes: Nearest) -> Iterator[Decoded]:
        """They come in one size only.

        Raises:
            UserError: the sizes are others.
        """
        if (own := tuple(self.pixels.shape[1:3])) not in sizes.sizes:
            raise UserError(f"the embedded images are {own}, the teacher draws {sizes.sizes[0]}")
        return (Decoded(f"emoji {i}", self.pixels[i].numpy(), ()) for i in numbers)


class _Entries(Sequence[Entry]):
    """The entries of some images, each made when it is asked for."""

    def __init__(self, entry: Callable[[int], Entry], numbers: Sequence[int]) -> None:
        self._entry, self._numbers = entry, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Entry: ...

    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...

    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self._entry(number) for number in self._numbers[index]]
        return self._entry(self._numbers[index])


@dataclass(frozen=True)
class CaptionedFiles:
    """Files of one kind with captions.

    Attributes:
        folder: where they lie.
        names: of the files below it, sorted.
        captions: one for each, see ``captions``.
        sources: where captions came from, with their number.
        nameless: files that have no caption but a name that is not UTF-8, and are left out.
    """

    folder: Path
    names: Texts
    captions: Texts
    sources: Counter[str]
    nameless: list[Skipped]

    @staticmethod
    def read(folder: Path, wanted: Callable[[str], bool]) -> CaptionedFiles:
        """Looks through a folder and all below it, and opens no file but those of captions.

        Args:
            folder: where.
            wanted: whether a file is one of them, by its path below the folder.

        Raises:
            UserError: a file of captions is no such.
        """
        stated = read_metadata(folder)
        found = sorted(
            path
            for path in folder.rglob("*")
            if wanted(path.relative_to(folder).as_posix()) and path.is_file()
        )
        sources, nameless, names = Counter[str](), list[Skipped](), list[str]()

        def captions() -> Iterator[str]:
            for file in found:
                name = file.relative_to(folder).as_posix()
                if (caption := caption_of(file, stated)) is None:
                    reason = "its name is not UTF-8, and there is no other caption"
                    nameless.append(Skipped(printable(name), reason))
                    continue
                sources[caption.source] += 1
                names.append(name)
                yield caption.text

        texts = Texts.of(captions())
        return CaptionedFiles(folder, Texts.of(names), texts, sources, nameless)

    def sha256(self) -> str:
        """Of names, sizes in bytes and captions, in their order."""
        sizes = ((self.folder / name).stat().st_size for name in self.names)
        return rows_sha256(zip(self.names, sizes, self.captions, strict=True))

    def remarks(self, noun: str) -> list[str]:
        """Lines that say where captions came from, and what is left out."""
        origins = ", ".join(f"{count} from {source}" for source, count in self.sources.items())
        first = [f"data.images: {len(self.names)} {noun}s, captions: {origins}"]
        return first + [f"data.images: {name} left out: {reason}" for name, reason in self.nameless[:5]]


@dataclass(frozen=True)
class ImageFolder:
    """Image files with captions, read by the rules of ``image_sources``, but turned upright.

    Attributes:
        files: where they lie.
    """

    files: CaptionedFiles
    noun = "image"

    @staticmethod
    def read(folder: Path) -> ImageFolder:
        """Looks through a folder and all below it, and opens no image.

        Raises:
            UserError: when it holds no image, or a file of captions is no such.
        """
        found = CaptionedFiles.read(folder, is_image)
        if not len(found.names):
            raise UserError(f"data.images: {folder} holds no image of {', '.join(sorted(ENDINGS))}")
        return ImageFolder(found)

    @property
    def captions(self) -> Sequence[str]:
        """One for each."""
        return self.files.captions

    def sha256(self) -> str:
        """Of names, sizes in bytes and captions, in their order."""
        return self.files.sha256()

    def decoded(self, numbers: Sequence[int], sizes: Nearest) -> Iterator[Decoded]:
        entries = _Entries(self._entry, numbers)
        return decode_all(entries, sizes, "anywhere", upright=True, workers=None)

    def _entry(self, number: int) -> Entry:
        name = self.files.names[number]
        return Entry(printable(name), (self.files.folder / name).read_bytes)

    def remarks(self) -> list[str]:
        """Lines that say where captions came from, and what is left out."""
        return self.files.remarks(self.noun)


@dataclass(frozen=True)
class ImageTars:
    """The images of webdataset tars, read where they lie in them, and turned upright.

    Attributes:
        tars: the archives.
        names: of the images, in the order of the archives and then of the samples.
        captions: one for each, see ``caption_in``.
        tar: which archive each lies in.
        starts, sizes: where in it, in bytes.
    """

    tars: tuple[Path, ...]
    names: Texts
    captions: Texts
    tar: array[int]
    starts: array[int]
    sizes: array[int]
    noun = "image"

    @staticmethod
    def read(tars: Sequence[Path]) -> ImageTars:
        """Looks through archives, and opens no image.

        Raises:
            UserError: one is compressed or damaged, a sample has no caption, or there is no image.
        """
        names, tar, starts, sizes = list[str](), array("I"), array("Q"), array("Q")

        def captions() -> Iterator[str]:
            for number, file in enumerate(tars):
                try:
                    for sample in webdataset(file):
                        ending = next((each for each in sample.places if f".{each.lower()}" in ENDINGS), None)
                        if ending is None:
                            continue
                        start, size = sample.places[ending]
                        names.append(f"{file.name}/{sample.key}.{ending}")
                        tar.append(number)
                        starts.append(start)
                        sizes.append(size)
                        yield caption_in(sample).strip()
                except BadRow as problem:
                    raise UserError(f"data.images: {file}: {problem}") from None
                except DAMAGE as error:
                    reason = " ".join(str(error).split())
                    raise UserError(f"data.images: {file} cannot be read: {reason}") from None

        if packed := next((file for file in tars if not file.name.lower().endswith(".tar")), None):
            raise UserError(
                f"data.images: {packed} is compressed, and images are read where they lie: unpack it"
            )
        texts = Texts.of(captions())
        if not names:
            raise UserError(f"data.images: {tars[0]} holds no image of {', '.join(sorted(ENDINGS))}")
        return ImageTars(tuple(tars), Texts.of(names), texts, tar, starts, sizes)

    def sha256(self) -> str:
        """Of names, sizes in bytes and captions, in their order."""
        return rows_sha256(zip(self.names, self.sizes, self.captions, strict=True))

    def decoded(self, numbers: Sequence[int], sizes: Nearest) -> Iterator[Decoded]:
        def entry(number: int) -> Entry:
            place = self.starts[number], self.sizes[number]
            return Entry(self.names[number], partial(_part, self.tars[self.tar[number]], *place))

        return decode_all(_Entries(entry, numbers), sizes, "anywhere", upright=True, workers=None)

    def remarks(self) -> list[str]:
        """A line that says how many there are."""
        return [f"data.images: {len(self.names)} images with their captions, in {len(self.tars)} tar files"]


def _part(file: Path, start: int, size: int) -> bytes:
    if size > LARGEST_FILE:
        raise Refused(f"claims {size} bytes; {LARGEST_FILE} are allowed")
    with opened(file) as stream:  # each time: of thousands of tars not all can be open
        return os.pread(stream.fileno(), size, start)


def find_images(place: Path) -> ImageFolder | ImageTars:
    """The images of a folder, of a webdataset tar, or of a folder that holds such tars and no images.

    Raises:
        UserError: there are none.
    """
    if place.is_file() and is_tar(place):
        return ImageTars.read([place])
    if not place.is_dir():
        raise UserError(f"data.images: {place} is not a folder: give one with images, or a webdataset .tar")
    tars = [file for file in place.iterdir() if file.is_file() and is_tar(file)]
    if tars and not any(is_image(file.name) for file in place.rglob("*")):
        return ImageTars.read(sorted(tars, key=lambda file: natural(file.name)))
    return ImageFolder.read(place)
