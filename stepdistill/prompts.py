"""Prompts out of a file, read alike for training, evaluation and export, in the file's order.

    .txt (or any other ending)   one prompt a line; empty lines are left out
    .jsonl, .json                texts, or objects with "prompt", "caption" or "text": a line each, a list or a table
    .csv, .tsv                   the column "prompt", "caption" or "text"
    .tar (.tar.gz, .tgz, ...)    a webdataset: of each sample, in the order of the names, its .txt or .json

Imports no torch, so that a mistake is told at once.
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

from stepdistill.errors import UserError

KEYS = ("prompt", "caption", "text")
"""Names of the field that holds the prompt; the first that is there counts."""
FORMS = "a text file with one prompt a line, or .jsonl, .json, .csv, .tsv or a webdataset .tar with captions"
LARGEST_CAPTION = 1 << 20
_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError, csv.Error, json.JSONDecodeError)


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
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except _Row as row:
        raise UserError(f"{what}: {file}: {row}") from None
    except _DAMAGE as error:
        raise UserError(f"{what}: {file} cannot be read: {' '.join(str(error).split())}") from None
    if not any(prompts):
        raise UserError(f"{what}: {file} holds no prompt; write one a line")
    return prompts


class _Row(Exception):
    """What is wrong with one row."""


def _read(file: Path) -> Iterable[str]:
    name = file.name.lower()
    if name.endswith(_TARS):
        return _of_webdataset(file)
    text = file.read_text(encoding="utf-8-sig")
    if name.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), 1)
        return [_json(line, f"line {i}") for i, line in lines if line.strip()]
    if name.endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, (dict, list)):
            raise _Row("is neither a list nor a table of prompts")
        rows = content.items() if isinstance(content, dict) else enumerate(content, 1)
        return [_field(row, f"entry {key}") for key, row in rows]
    if name.endswith((".csv", ".tsv")):
        tab = name.endswith(".tsv")
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tab else ",")
        return [_field(row, f"line {table.line_num}") for row in table]
    # Not splitlines: captions of the web have form feeds and U+2028 inside, and row i belongs to image i.
    return [line for line in text.split("\n") if line.strip()]


def _field(row: Any, place: str) -> str:
    if isinstance(row, str):
        return row
    named = [row[key] for key in KEYS if key in row] if isinstance(row, dict) else []
    if not named or not isinstance(named[0], str):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise _Row(f"{place} has no text under {', '.join(KEYS)} (it has {found or 'nothing'})")
    return named[0]


def _json(text: str, place: str) -> str:
    try:
        return _field(json.loads(text), place)
    except json.JSONDecodeError as error:
        raise _Row(f"{place} is not JSON ({error})") from None


def _of_webdataset(file: Path) -> Iterator[str]:
    from stepdistill.image_sources import natural, sample_of

    captions: dict[str, str | None] = {}
    with tarfile.open(file, "r:*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            key, ending = sample_of(member.name)
            captions.setdefault(key, None)
            if ending not in ("txt", "json") or (ending == "json" and captions[key] is not None):
                continue
            if member.size > LARGEST_CAPTION:
                raise _Row(f"{member.name} claims {member.size} bytes; a caption may have {LARGEST_CAPTION}")
            stream = archive.extractfile(member)
            text = stream.read().decode("utf-8") if stream else ""
            captions[key] = text if ending == "txt" else _json(text, member.name)
    for key in sorted(captions, key=natural):
        caption = captions[key]
        if caption is None:
            raise _Row(f"sample {key} has neither {key}.txt nor {key}.json")
        yield caption
