"""What goes out with a student: names instead of this machine's folders, and the terms of its teacher."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.networks.find import local_folder
from stepdistill.system.parsing import parse_json

_FOLDERS = re.compile(r"(?<![\w.~:/-])(?:~|\.{0,2})/(?:[^\s/'\"=,;)\]}]+/)+")
_NAME = "_name_or_path"
_TERMS = ("license", "license_name", "license_link")


def without_folders(text: str) -> str:
    """A text in which /home/me/prompts.txt is prompts.txt; relative places stay."""
    return _FOLDERS.sub("", text)


def is_hub_name(teacher: str) -> bool:
    """Whether others find a teacher under its name."""
    return teacher.count("/") == 1 and not teacher.startswith((".", "~", "/")) and not Path(teacher).exists()


def shown_name(teacher: str) -> str:
    """The teacher as it is called elsewhere: a folder by its last name."""
    return teacher if is_hub_name(teacher) else Path(teacher).name


def loaded_from(teacher: str) -> str:
    """What a reader of a card loads the teacher from."""
    return teacher if is_hub_name(teacher) else f"path/to/{shown_name(teacher)}"


def take_out_folders(folder: Path) -> None:
    """In the JSON files of a student's folder, the places of this machine that diffusers and transformers note down."""
    for file in folder.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        if f'"{_NAME}"' in text and (content := parse_json(text)) != (plain := _plain(content)):
            file.unlink()  # it may be a link
            file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        kept = {key: _plain(value) for key, value in content.items()}
        return {
            k: v for k, v in kept.items() if k != _NAME or not isinstance(v, str) or not v or is_hub_name(v)
        }
    return [_plain(each) for each in content] if isinstance(content, list) else content


@dataclass(frozen=True)
class Terms:
    """What a teacher's folder says of its use.

    Attributes:
        metadata: the licence's keys of its model card.
        base_model: what its card says that it was made from.
        files: its licence's texts.
    """

    metadata: dict[str, str]
    base_model: str | None
    files: tuple[Path, ...]


def terms_of(source: Any) -> Terms:
    """Of a teacher's folder, or of the Hub's on this disk; nothing of an object."""
    folder = local_folder(source) if isinstance(source, str | Path) else None
    if folder is None:
        return Terms({}, None, ())
    from huggingface_hub.repocard import metadata_load

    try:
        found: dict[str, Any] = metadata_load(folder / "README.md") or {}
    except Exception:  # no card, or one that is no YAML: it states nothing
        found = {}
    base = found.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return Terms(
        {key: str(found[key]) for key in _TERMS if found.get(key)},
        base if isinstance(base, str) else None,
        tuple(file for file in sorted(folder.glob("LICENSE*")) if file.is_file()),
    )


def carry_terms(source: Any, folder: Path) -> None:
    """Copies the teacher's licence texts into a student's folder."""
    for file in terms_of(source).files:
        shutil.copyfile(file, folder / file.name)
