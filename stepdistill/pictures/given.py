"""Pictures that a pipeline draws from, such as the first frame of a video, or what is to be edited: prompts name them.

    make the car red <image: photos/car.png>

is how one is written, in a line of a text file and everywhere else; rows of .jsonl, .json, .csv, .tsv and of a folder's
metadata may name it under ``input_image`` instead, beside their prompt. A relative path is that of a file beside the
one that names it. Pictures are turned upright, and cropped and resized to what is drawn.

Imports no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stepdistill.errors import UserError
from stepdistill.system.files import sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "input_image"
"""Name of the field of a row that holds the picture's path."""
RELATIVE = "a relative path is that of a file beside the one that names it"
_NAMED = re.compile(r"^(?P<words>.*?)\s*<image: (?P<file>[^<>\n]+)>$", re.DOTALL)


class Asked(NamedTuple):
    """What a prompt asks for.

    Attributes:
        words: its text.
        picture: the file of the picture that it names; None where it names none.
    """

    words: str
    picture: Path | None


def asked(prompt: str) -> Asked:
    """A prompt taken apart."""
    found = _NAMED.match(prompt) if prompt.endswith(">") else None
    return Asked(prompt, None) if found is None else Asked(found["words"], Path(found["file"].strip()))


def any_named(prompts: Iterable[str]) -> bool:
    """Whether a prompt names a picture."""
    return any(asked(prompt).picture is not None for prompt in prompts)


def words_of(prompts: Iterable[str]) -> list[str]:
    """The texts of prompts, without the pictures that they name."""
    return [asked(prompt).words for prompt in prompts]


def with_picture(words: str, picture: str | Path) -> str:
    """The prompt that names a picture.

    Raises:
        ValueError: its path holds what ends one.
    """
    if set(str(picture)) & set("<>\n"):
        raise ValueError(f"the path {str(picture)!r} holds <, > or a line feed: rename the file")
    return f"{words} <image: {picture}>".lstrip()


def row_of(prompt: str) -> dict[str, str]:
    """A prompt as a row of a table."""
    words, picture = asked(prompt)
    return {"prompt": words} | ({KEY: str(picture)} if picture is not None else {})


def found_from(prompt: str, folder: Path) -> str:
    """A prompt that a file in ``folder`` holds: the path of its picture is made absolute."""
    words, picture = asked(prompt)
    return prompt if picture is None else with_picture(words, (folder / picture).absolute())


def opened(picture: Path, height: int, width: int) -> Image:
    """A picture as it is drawn from, RGB.

    Raises:
        UserError: it is not there, cannot be read, or is not taken for the reason that is told.
    """
    from PIL import Image

    from stepdistill.pictures.decoding import decode

    if not picture.is_file():
        raise UserError(f"{picture}, which a prompt names, not found: {RELATIVE}")
    _, pixels, notes = decode(picture.name, picture.read_bytes, (height, width), upright=True)
    if pixels is None:
        raise UserError(f"{picture}, which a prompt names, {'; '.join(notes)}")
    return Image.fromarray(pixels)


def placeholder(height: int, width: int) -> Image:
    """A picture that stands for any: colours that say where they are."""
    import numpy as np
    from PIL import Image

    down, right = np.mgrid[:height, :width]
    planes = (
        255 * down / max(1, height - 1),
        255 * right / max(1, width - 1),
        255 * ((down // 8 + right // 8) % 2),
    )
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def pictures_of(prompts: Iterable[str], height: int, width: int) -> list[Image]:
    """The picture that each prompt names, or what stands for any where it names none, as plans and checks ask.

    Raises:
        UserError: see :func:`opened`.
    """
    named = [asked(prompt).picture for prompt in prompts]
    return [placeholder(height, width) if one is None else opened(one, height, width) for one in named]


def identity(prompt: str) -> str:
    """A prompt with the content of its picture in place of the path.

    Raises:
        UserError: it is not there.
    """
    words, picture = asked(prompt)
    if picture is None:
        return prompt
    if not picture.is_file():
        raise UserError(f"{picture}, which a prompt names, not found: {RELATIVE}")
    state = picture.stat()
    return f"{words} <image: sha256 {_sha256(picture, state.st_size, state.st_mtime_ns)}>"


@cache
def _sha256(picture: Path, size: int, changed: int) -> str:
    """Of a file as it is since it was changed: prompts are hashed more than once, and pictures are large."""
    return sha256_of(picture)


def check_there(prompts: Iterable[str], what: str) -> None:
    """The pictures that prompts name are there.

    Args:
        prompts: the prompts.
        what: asks for them.

    Raises:
        UserError: for the first that is not.
    """
    for number, prompt in enumerate(prompts, 1):
        picture = asked(prompt).picture
        if picture is not None and not picture.is_file():
            raise UserError(f"{what}: prompt {number} names {picture}, which is not there: {RELATIVE}")


def check_named(
    prompts: Sequence[str], wanted: bool, name: str, what: str = "data.prompts", *, optional: bool = False
) -> None:
    """Prompts name a picture each where the pipeline draws from one, and none elsewhere; the files are there.

    Args:
        prompts: the prompts.
        wanted: whether it draws from one.
        name: of the pipeline's class.
        what: asks for the prompts.
        optional: whether it also draws from prompts of which none names one.

    Raises:
        UserError: for the first that does not.
    """
    if wanted and optional and not any_named(prompts):
        return
    for number, prompt in enumerate(prompts, 1):
        picture = asked(prompt).picture
        if picture is None and wanted:
            why = "others name one" if optional else f"{name} draws from one"
            raise UserError(
                f"{what}: prompt {number}, {prompt!r}, names no picture, but {why}: write '{prompt} <image: FILE>', "
                f'give rows with a "prompt" and its "{KEY}", or, to sample, --image FILE'
            )
        if picture is not None and not wanted:
            raise UserError(
                f"{what}: prompt {number}, {prompt!r}, names a picture, but {name} draws from text alone: leave it out"
            )
    check_there(prompts, what)
