"""What the names of image files say: which are images, their order, and the sample of a webdataset they belong to."""

from __future__ import annotations

import re
from pathlib import Path

ENDINGS = frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff .gif .ppm .pgm".split())


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return Path(name).suffix.lower() in ENDINGS and not of_macos(name)


def of_macos(name: str) -> bool:
    """Whether a file is one of those that macOS puts beside each file in an archive: ._a.jpg beside a.jpg."""
    path = Path(name)
    return path.name.startswith("._") or "__MACOSX" in path.parts


def sample_of(name: str) -> tuple[str, str]:
    """A webdataset name's sample and field: (a/b/001, seg.png) of a/b/001.seg.png."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending


def natural(name: str) -> tuple[list[str | int], str]:
    """The key of the order of names: digits count as numbers; equal numbers are told apart by their spelling."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
