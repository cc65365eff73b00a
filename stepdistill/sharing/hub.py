"""The folder that is pushed to the Hub: a student's files, unaltered since they were verified, and its card."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stepdistill.errors import UserError
from stepdistill.export.shared import is_hub_name
from stepdistill.export.verify import check_unaltered, student_folder
from stepdistill.networks.own_call import VERIFICATION
from stepdistill.networks.pipeline_files import ADAPTER, LORA, pipeline_class
from stepdistill.sharing.hub_card import hub_card, local_paths, parted
from stepdistill.system.files import folder_written_whole, size_text
from stepdistill.system.parsing import parse_json

CARD = "README.md"
MANIFEST = f"{VERIFICATION}/manifest.json"


@dataclass(frozen=True)
class HubFolder:
    """What is pushed.

    Attributes:
        repo: OWNER/NAME.
        files: by name in the repository, a file, or the content of one that was made for it.
        warnings: what its reader should know before it is public, one sentence each.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    warnings: tuple[str, ...]


@contextlib.contextmanager
def exported(run: Path, what: Literal["adapter", "merged"] | None) -> Iterator[Path]:
    """The folder of a run's student. One that was exported in another way than ``what`` says is exported anew from the
    run's last checkpoint, for as long as the block lasts.

    Raises:
        UserError: there is no student, or none of that kind.
    """
    folder = student_folder(run)
    alone, lora = (folder / ADAPTER).is_file(), (folder / LORA).is_file()
    if what is None or (alone if what == "adapter" else not lora):
        yield folder
        return
    if not (folder.parent / "recipe.yaml").is_file():
        raise UserError(
            f"{run} is no run folder, from which the {what} alone could be exported: give that one"
        )
    from stepdistill.training.distil import export_run

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{what}-") as place:
        yield export_run(folder.parent, Path(place) / "student", [f"export.what={what}"])


def prepare(
    folder: Path,
    repo: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
) -> HubFolder:
    """What is pushed of a student.

    Args:
        folder: of the student.
        repo: OWNER/NAME.
        base_model: the teacher on the Hub; None is the one that the card names.
        licence: of the student, a name that the Hub knows; None is the teacher's, which the card carries.

    Raises:
        UserError: a file was altered, a path of this disk is in one, or nobody would find the teacher of an adapter.
    """
    manifest = check_unaltered(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(manifest["files"])}
    card = (folder / CARD).read_text("utf-8")
    told, _ = parted(card)
    known = base_model or told.get("base_model")
    if ADAPTER in files:
        of = parse_json((folder / ADAPTER).read_text("utf-8"))
        if base_model is None and not is_hub_name(str(of["teacher"])):
            raise UserError(
                f"{folder} is an adapter for {of['teacher']}, which nobody else finds: give --base-model OWNER/NAME"
            )
        pipeline, known = str(of["pipeline"]), base_model or str(of["teacher"])
        content = (json.dumps({**of, "teacher": known}, indent=1) + "\n").encode()
        files[ADAPTER], manifest["files"][ADAPTER] = content, hashlib.sha256(content).hexdigest()
    else:
        pipeline = pipeline_class(folder)
    warnings = []
    if licence is None and "license" not in told:
        warnings.append("no licence of the teacher is known, so the card states none: give --license NAME")
    if known is None:
        warnings.append(
            "the card names no base model: give --base-model OWNER/NAME where the teacher is on the Hub"
        )
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
    files[CARD] = hub_card(
        card,
        repo=repo,
        pipeline=pipeline,
        call=manifest["call"],
        files=files,
        base_model=known,
        licence=licence,
    ).encode()
    _check_paths(files)
    return HubFolder(repo, dict(sorted(files.items())), tuple(warnings))


def _check_paths(files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        if not name.endswith((".json", ".md")):
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")
        if found := local_paths(name, text):
            remedy = (
                "edit it, or give --base-model OWNER/NAME" if name == CARD else "export the student again"
            )
            raise UserError(f"{name} names {found[0]}, a path of this disk: {remedy}")


def listing(folder: HubFolder) -> str:
    """The files and their sizes, one a line, and how much that is in all."""
    sizes = {name: _size(content) for name, content in folder.files.items()}
    rows = [f"{size_text(size):>11}  {name}" for name, size in sizes.items()]
    return "\n".join([*rows, f"{size_text(sum(sizes.values())):>11}  {len(rows)} files for {folder.repo}"])


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def write(folder: HubFolder, to: Path) -> Path:
    """Writes what would be pushed; weights are hard links where the disk allows it. An earlier such folder is replaced.

    Raises:
        UserError: something else is there.
    """
    if to.exists() and not (to / MANIFEST).is_file() and (to.is_file() or any(to.iterdir())):
        raise UserError(f"{to} is there, and no folder of an earlier push: give another --output")
    with folder_written_whole(to) as place:
        for name, content in folder.files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            _put(content, place / name)
    return to


def _put(content: Path | bytes, to: Path) -> None:
    if isinstance(content, bytes):
        to.write_bytes(content)
        return
    try:
        if content.suffix != ".safetensors":
            raise OSError  # a text may be edited, and its original is not to change
        os.link(content.resolve(), to)
    except OSError:
        shutil.copyfile(content, to)
