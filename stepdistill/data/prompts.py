"""Prompts out of a file, read alike for training, evaluation and export, in the file's order.

    .txt (or any other ending)   one prompt a line; empty lines are left out
    .jsonl, .json                texts, or objects with "prompt", "caption" or "text": a line each, a list or a table
    .csv, .tsv                   the column "prompt", "caption" or "text"
    .tar (.tar.gz, .tgz, ...)    a webdataset: of each sample, in the order of the names, its .txt, .json or .cls

Names of keys and columns count without case. A prompt may name a picture that is drawn from, see ``pictures.given``.
Imports no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import csv
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stepdistill.data.image_names import natural, of_macos, sample_of
from stepdistill.data.tars import open_tar
from stepdistill.data.texts import Texts
from stepdistill.errors import UserError
from stepdistill.pictures.given import KEY as PICTURE_KEY
from stepdistill.pictures.given import found_from, with_picture
from stepdistill.system.parsing import Unreadable, parse_json
from stepdistill.system.shipped import is_lfs_pointer

KEYS = ("prompt", "caption", "text")
"""Names of the field that holds the prompt; the first that is there counts."""
FORMS = "a text file with one prompt a line, or .jsonl, .json, .csv, .tsv or a webdataset .tar with captions"
LARGEST_CAPTION = 1 << 20
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONE_RETURN = re.compile(rb"(?<=\r)(?!\n)")
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
DAMAGE = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, csv.Error, Unreadable)


def is_tar(file: Path) -> bool:
    """Whether a file's name is that of a tar, compressed or not."""
    return file.name.lower().endswith(_TARS)


def open_prompts(file: Path, what: str = "data.prompts") -> Texts:
    """The prompts of a file, looked through once, a line at a time, and read where they lie; those of a .json or a tar
    lie in one block of bytes. Rows of tables and samples of a webdataset all count, also those whose prompt is empty,
    as row i may belong to image i.

    Args:
        file: see the head of this module.
        what: asks for it, to begin an error with.

    Raises:
        UserError: when there is no such file, it is damaged or not UTF-8, a row has no prompt, or all are empty.
    """
    if not file.is_file():
        raise UserError(f"{what}: {file} not found: give {FORMS}")
    try:
        _refuse_pointer(file)
        if is_tar(file) or file.suffix.lower() == ".json":
            found = _of_webdataset(file) if is_tar(file) else _of_json(file)
            prompts = Texts.of(prompt.strip() for prompt in found)
        else:
            prompts = _of_lines(file)
        empty = not any(prompts)
    except BadRow as row:
        raise UserError(f"{what}: {file}: {row}") from None
    except DAMAGE as error:
        raise UserError(f"{what}: {file} cannot be read: {' '.join(str(error).split())}") from None
    if empty:
        raise UserError(f"{what}: {file} holds no prompt; write one a line")
    return prompts


def read_prompts(file: Path, what: str = "data.prompts") -> list[str]:
    """All prompts of :func:`open_prompts`, as strings."""
    return list(open_prompts(file, what))


def read_rich(file: Path) -> dict[str, str]:
    """The rich caption of each prompt of a file whose rows have both, see ``data.rich``.

    Raises:
        UserError: there is no such file, it is damaged, or a row lacks one of the two.
    """
    if not file.is_file():
        raise UserError(
            f'data.rich: {file} not found: give a .jsonl or .csv with a "prompt" and its "rich" caption'
        )
    try:
        if file.suffix.lower() == ".json":
            content = parse_json(text_in(file))
            if not isinstance(content, list):
                raise BadRow("is no list of prompts and their rich captions")
            rows = [(f"entry {i}", row) for i, row in enumerate(content, 1)]
        else:
            rows = [(row.place, row.content) for row in file_rows(file)]
        return {text_of(row, place).strip(): _rich(row, place) for place, row in rows}
    except BadRow as row:
        raise UserError(f"data.rich: {file}: {row}") from None
    except DAMAGE as error:
        raise UserError(f"data.rich: {file} cannot be read: {' '.join(str(error).split())}") from None


def _rich(row: Any, place: str) -> str:
    name = named(row, "rich")
    if name is None or not isinstance(row[name], str) or not row[name].strip():
        raise BadRow(f"{place} has no text under rich, which is to say what its prompt means in full")
    return str(row[name]).strip()


class BadRow(Exception):
    """What is wrong with a file of texts, or with one row of it."""


def text_in(file: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        BadRow: it is not UTF-8, or a Git LFS pointer.
    """
    _refuse_pointer(file)
    return _utf8(file.read_bytes(), "").replace("\r\n", "\n").replace("\r", "\n")


def _refuse_pointer(file: Path) -> None:
    if is_lfs_pointer(file):
        raise BadRow("is a Git LFS pointer, not the file itself: run git lfs pull where it lies")


def _utf8(content: bytes, place: str, before: int = 0) -> str:
    try:
        return content.decode("utf-8" if before else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"{place}is not UTF-8 text ({error.reason} at byte {before + error.start})") from None


def _of_json(file: Path) -> Iterator[str]:
    content = parse_json(text_in(file))
    if not isinstance(content, (dict, list)):
        raise BadRow("is neither a list nor a table of prompts")
    rows = content.items() if isinstance(content, dict) else enumerate(content, 1)
    return (prompt_of(row, f"entry {key}", file.parent) for key, row in rows)


def _of_lines(file: Path) -> Texts:
    texts = Texts(file, _parser(file))
    for row in file_rows(file):
        prompt_of(row.content, row.place, file.parent)
        texts.add(row.start, row.size)
    return texts


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: of it, for messages.
        content: what it holds: a line of text, what a line of JSON says, or a table's row by the names of its columns.
        start, size: its place in the file, in bytes.
    """

    place: str
    content: Any
    start: int
    size: int


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of a .jsonl, of a .csv or .tsv with a header, or the lines of a text; without empty lines, and one at a
    time.

    Raises:
        BadRow: it is not UTF-8, a Git LFS pointer, or a line is not JSON.
    """
    _refuse_pointer(file)
    with file.open("rb") as stream:
        lines = _Lines(stream)
        for place, content in _parsed(file, lines):
            yield Row(place, content, lines.told, lines.end - lines.told)
            lines.told = lines.end


def _parsed(file: Path, lines: _Lines) -> Iterator[tuple[str, Any]]:
    if (delimiter := _DELIMITERS.get(file.suffix.lower())) is not None:
        table = csv.DictReader(lines, delimiter=delimiter)
        lines.told = lines.end if table.fieldnames else 0
        for row in table:
            yield f"line {table.line_num}", row
        return
    in_json = file.suffix.lower() == ".jsonl"
    # Not splitlines: captions of the web have form feeds and U+2028 inside, and row i belongs to image i.
    for i, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {i}", _json(line, f"line {i}") if in_json else line


class _Lines:
    """The lines of a file, each with one line feed at its end; ``end`` is where the last one ended, in bytes, and
    ``told`` where the row begins that it belongs to."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.end, self.told = stream, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            for piece in filter(None, _LONE_RETURN.split(line)):
                start, self.end = self.end, self.end + len(piece)
                yield _utf8(piece, "", start).rstrip("\r\n") + "\n"


def _parser(file: Path) -> Callable[[bytes], str]:
    """What makes the prompt of the bytes of a row."""
    if (delimiter := _DELIMITERS.get(file.suffix.lower())) is not None:
        with file.open("rb") as stream:
            header = csv.DictReader(_Lines(stream), delimiter=delimiter).fieldnames
        return partial(_cell, file.parent, tuple(header or ()), delimiter)
    return partial(_in_json if file.suffix.lower() == ".jsonl" else _line, file.parent)


def _line(folder: Path, content: bytes) -> str:
    return prompt_of(_utf8(content, ""), "", folder)


def _in_json(folder: Path, content: bytes) -> str:
    return prompt_of(parse_json(_utf8(content, "")), "", folder)


def _cell(folder: Path, header: Sequence[str], delimiter: str, content: bytes) -> str:
    table = csv.DictReader(_Lines(io.BytesIO(content)), header, delimiter=delimiter)
    return prompt_of(next(table), "", folder)


def prompt_of(row: Any, place: str, folder: Path) -> str:
    """The prompt of a row of a file in ``folder``: its text, with the picture that the row names.

    Raises:
        BadRow: it has none, or its picture is no path.
    """
    text, name = text_of(row, place).strip(), named(row, PICTURE_KEY)
    if name is not None and row[name] not in (None, ""):
        if not isinstance(row[name], str):
            raise BadRow(f"{place}: {name} is {row[name]!r}, not the path of a picture")
        try:
            text = with_picture(text, row[name].strip())
        except ValueError as error:
            raise BadRow(f"{place}: {name}: {error}") from None
    return found_from(text, folder)


def text_of(row: Any, place: str) -> str:
    """The prompt of a row: a text, or a table with one of KEYS.

    Raises:
        BadRow: it has none.
    """
    if isinstance(row, str):
        return row
    name = next((own for key in KEYS if (own := named(row, key)) is not None), None)
    if name is None:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise BadRow(f"{place} has no text under {', '.join(KEYS)} (it has {has or 'nothing'})")
    value = row[name]
    if isinstance(value, list):
        raise BadRow(f"{place}: {name} is a list of {len(value)}: give each text a row of its own")
    if not isinstance(value, str):
        raise BadRow(f"{place}: {name} is {'empty' if value is None else repr(value)}, not a text")
    return value


def named(row: Any, key: str) -> str | None:
    """What a table calls ``key``, whatever its case; None where it has no such key."""
    keys = row if isinstance(row, dict) else ()
    return next((own for own in keys if str(own).strip().lower() == key), None)


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except Unreadable as error:
        raise BadRow(f"{place} is not JSON ({error})") from None


def _of_webdataset(file: Path) -> Iterator[str]:
    return (caption_in(sample) for sample in webdataset(file))


class Sample(NamedTuple):
    """A sample of a webdataset.

    Attributes:
        key: its name.
        texts: what its .txt, .json and .cls say.
        places: of its other files, by their endings, where they begin in the archive, in bytes, and their sizes.
    """

    key: str
    texts: dict[str, bytes]
    places: dict[str, tuple[int, int]]


def caption_in(sample: Sample) -> str:
    """The caption of a sample: its .txt, else its .json, else the class in its .cls.

    Raises:
        BadRow: it has none, or no text in it.
    """
    key, texts = sample.key, sample.texts
    for ending in ("txt", "json", "cls"):  # a .json beside a text tells where the image is from, as a rule
        if ending in texts:
            name = f"{key}.{ending}"
            text = _utf8(texts[ending], f"{name} ")
            return text_of(_json(text, name), name) if ending == "json" else text
    raise BadRow(f"sample {key} has neither {key}.txt nor {key}.json")


def webdataset(file: Path) -> Iterator[Sample]:
    """The samples of a tar in the order of their names.

    Raises:
        BadRow: a caption claims to be longer than LARGEST_CAPTION.
    """
    samples: dict[str, Sample] = {}
    with open_tar(file) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a description of every file read so far
            if not member.isfile() or of_macos(member.name):
                continue
            key, ending = sample_of(member.name)
            sample = samples.setdefault(key, Sample(key, {}, {}))
            if ending not in ("txt", "json", "cls"):
                sample.places[ending] = member.offset_data, member.size
                continue
            if member.size > LARGEST_CAPTION:
                raise BadRow(
                    f"{member.name} claims {member.size} bytes; a caption may have {LARGEST_CAPTION}"
                )
            stream = archive.extractfile(member)
            sample.texts[ending] = stream.read() if stream else b""
    for key in sorted(samples, key=natural):
        yield samples.pop(key)
