"""Prompts out of a file, read alike for training, evaluation and export, in the file's order.

    .txt (or any other ending)   one prompt a line; empty lines are left out
    .jsonl, .json                texts, or objects with "prompt", "caption" or "text": a line each, a list or a table
    .csv, .tsv                   the column "prompt", "caption" or "text"
    .tar (.tar.gz, .tgz, ...)    a webdataset: of each sample, in the order of the names, its .txt, else its .json

Names of keys and columns count without case. Imports no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stepdistill.data.image_names import natural, of_macos, sample_of
from stepdistill.errors import UserError
from stepdistill.system.shipped import is_lfs_pointer

KEYS = ("prompt", "caption", "text")
"""Names of the field that holds the prompt; the first that is there counts."""
FORMS = "a text file with one prompt a line, or .jsonl, .json, .csv, .tsv or a webdataset .tar with captions"
LARGEST_CAPTION = 1 << 20
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError, csv.Error, json.JSONDecodeError)


def read_prompts(file: Path, what: str = "data.prompts") -> list[str]:
    """The prompts of a file. Rows of tables and samples of a webdataset all count, also those whose prompt is empty, as
    row i may belong to image i.

    Args:
        file: see the head of this module.
        what: asks for it, to begin an error with.

    Raises:
        UserError: when there is no such file, it is damaged or not UTF-8, a row has no prompt, or all are empty.
    """
    if not file.is_file():
        raise UserError(f"{what}: {file} not found: give {FORMS}")
    try:
        prompts = [prompt.strip() for prompt in _read(file)]
    except BadRow as row:
        raise UserError(f"{what}: {file}: {row}") from None
    except DAMAGE as error:
        raise UserError(f"{what}: {file} cannot be read: {' '.join(str(error).split())}") from None
    if not any(prompts):
        raise UserError(f"{what}: {file} holds no prompt; write one a line")
    return prompts


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


def _utf8(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"{place}is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _read(file: Path) -> Iterable[str]:
    name = file.name.lower()
    if name.endswith(_TARS):
        _refuse_pointer(file)
        return _of_webdataset(file)
    text = text_in(file)
    if name.endswith(".jsonl"):
        return [text_of(row, place) for place, row in json_rows(text)]
    if name.endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, (dict, list)):
            raise BadRow("is neither a list nor a table of prompts")
        rows = content.items() if isinstance(content, dict) else enumerate(content, 1)
        return [text_of(row, f"entry {key}") for key, row in rows]
    if name.endswith((".csv", ".tsv")):
        return [text_of(row, place) for place, row in table_rows(text, tab=name.endswith(".tsv"))]
    # Not splitlines: captions of the web have form feeds and U+2028 inside, and row i belongs to image i.
    return [line for line in text.split("\n") if line.strip()]


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


def json_rows(text: str) -> Iterator[tuple[str, Any]]:
    """What the lines of a .jsonl hold, each with its place for messages; empty lines are left out."""
    for i, line in enumerate(text.split("\n"), 1):  # U+2028 inside a text ends no line
        if line.strip():
            yield f"line {i}", _json(line, f"line {i}")


def table_rows(text: str, *, tab: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .csv or .tsv with a header, each with its place for messages."""
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tab else ",")
    for row in table:
        yield f"line {table.line_num}", row


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{place} is not JSON ({error})") from None


def _of_webdataset(file: Path) -> Iterator[str]:
    samples: dict[str, dict[str, tuple[str, str]]] = {}  # of each sample: ending -> name and text
    with tarfile.open(file, "r:*") as archive:
        for member in archive:
            if not member.isfile() or of_macos(member.name):
                continue
            key, ending = sample_of(member.name)
            fields = samples.setdefault(key, {})
            if ending not in ("txt", "json"):
                continue
            if member.size > LARGEST_CAPTION:
                raise BadRow(
                    f"{member.name} claims {member.size} bytes; a caption may have {LARGEST_CAPTION}"
                )
            stream = archive.extractfile(member)
            fields[ending] = member.name, _utf8(stream.read() if stream else b"", f"{member.name} ")
    for key in sorted(samples, key=natural):
        if "txt" in samples[key]:  # a .json beside it tells where the image is from, as a rule
            yield samples[key]["txt"][1]
        elif "json" in samples[key]:
            name, text = samples[key]["json"]
            yield text_of(_json(text, name), name)
        else:
            raise BadRow(f"sample {key} has neither {key}.txt nor {key}.json")
