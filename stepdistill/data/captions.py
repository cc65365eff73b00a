"""Captions of image files: from metadata of their folder or one above, from a text beside them, or from their names.

    metadata.jsonl, metadata.csv   rows with ``file_name``, relative to the metadata's own folder, and a text under one
                                   of the names that prompt files have; the nearest folder's counts
    a.txt beside a.png             all of it
    a.png                          ``a``, with ``_`` and ``-`` as spaces

Imports no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from stepdistill.data.prompts import DAMAGE, BadRow, file_rows, named, prompt_of, text_in
from stepdistill.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_KEY = "file_name"
FROM_TEXT, FROM_NAME = "texts beside them", "their file names"


class Caption(NamedTuple):
    """A caption and where it is from.

    Attributes:
        text: the caption.
        source: a metadata file relative to the folder, FROM_TEXT or FROM_NAME.
    """

    text: str
    source: str


def read_metadata(folder: Path) -> dict[Path, Caption]:
    """The captions that all metadata files of a folder and the folders in it state, by the path of the image.

    Raises:
        UserError: one is not UTF-8, not what its ending says, or has a row without a file name or a text.
    """
    found: dict[Path, Caption] = {}
    files = [file for name in METADATA for file in folder.rglob(name) if file.is_file()]
    for file in sorted(
        files, key=lambda file: len(file.parts)
    ):  # the nearest to an image is read last, and counts
        source = file.relative_to(folder).as_posix()
        try:
            for place, row, *_ in file_rows(file):
                name = named(row, FILE_KEY) if isinstance(row, dict) else None
                if name is None or not isinstance(row[name], str) or not row[name].strip():
                    raise BadRow(f"{place} has no {FILE_KEY}")
                image = Path(os.path.normpath(file.parent / row[name].strip()))
                found[image] = Caption(prompt_of(row, place, file.parent), source)
        except BadRow as problem:
            raise UserError(f"data.images: {file}: {problem}") from None
        except DAMAGE as error:
            raise UserError(f"data.images: {file} cannot be read: {' '.join(str(error).split())}") from None
    return found


def caption_of(image: Path, stated: dict[Path, Caption]) -> Caption | None:
    """The caption of an image file; None where only a name is left that is not UTF-8.

    Args:
        image: the file, as a path below the folder that was given to :func:`read_metadata`.
        stated: what that found.

    Raises:
        UserError: the text beside it is not UTF-8.
    """
    if (caption := stated.get(Path(os.path.normpath(image)))) is not None:
        return caption
    beside = image.with_suffix(".txt")
    if beside.is_file():
        try:
            return Caption(text_in(beside).strip(), FROM_TEXT)
        except BadRow as problem:
            raise UserError(f"data.images: {beside}: {problem}") from None
    name = image.stem.replace("_", " ").replace("-", " ")
    return Caption(name, FROM_NAME) if name == printable(name) else None


def printable(name: str) -> str:
    """A file's name for messages: bytes that are not UTF-8 as backslashes and numbers."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
