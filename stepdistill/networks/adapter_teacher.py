"""Of which teacher an adapter alone is: its name and hash in adapter.json, and in the user's cache where it lies here.

So the folder of the adapter names no place of the machine that made it.
"""

from __future__ import annotations

import json
from pathlib import Path

from stepdistill.networks.find import local_folder
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.pipeline_files import ADAPTER
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json
from stepdistill.system.shipped import cache_folder


def note_teacher(source: str, pipeline: str, folder: Path) -> None:
    """Writes adapter.json, and where the teacher lies.

    Args:
        source: the teacher's folder or Hub name.
        pipeline: its class.
        folder: of the adapter.
    """
    sha256, place = weights_hash(source), Path(source)
    name = place.name if place.is_dir() else source
    of = {"teacher": name, "teacher_sha256": sha256, "pipeline": pipeline}
    (folder / ADAPTER).write_text(json.dumps(of, indent=1) + "\n", encoding="utf-8")
    if place.is_dir():
        note = place_note(sha256)
        note.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(note) as temporary:
            temporary.write_text(f"{place.absolute()}\n", encoding="utf-8")


def place_note(sha256: str) -> Path:
    """The file that says where the teacher of these weights lies."""
    return cache_folder() / "teachers" / f"{sha256}.txt"


def teacher_named(folder: Path) -> tuple[str, str]:
    """What the teacher of an adapter's folder is loaded from, as far as it is known here, and its hash."""
    of = parse_json((folder / ADAPTER).read_text("utf-8"))
    note = place_note(of["teacher_sha256"])
    place = note.read_text("utf-8").strip() if note.is_file() else ""
    known = place if place and local_folder(place) is not None else str(of["teacher"])
    return known, str(of["teacher_sha256"])
