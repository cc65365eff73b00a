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
from stepdistill.export.adapters import KOHYA
from stepdistill.export.student_folder import VERIFICATION
from stepdistill.export.verify import check_unaltered, student_folder
from stepdistill.networks.find import local_folder
from stepdistill.networks.pipeline_files import ADAPTER, LORA, pipeline_class
from stepdistill.sharing.hub_card import hub_card, licence_of, local_paths, metadata
from stepdistill.system.files import folder_written_whole, size_text

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
def exported(run: Path, what: Literal["adapter", "merged"] | None) -> Iterator[tuple[Path, Path]]:
    """The folder of a run's student, and where it lies in the run. An adapter alone, of a student that was exported in
    another way, is exported anew, for as long as the block lasts.

    Raises:
        UserError: there is no student, or none of that kind.
    """
    folder = student_folder(run)
    alone = (folder / ADAPTER).is_file()
    if what is None or (what == "adapter") == alone:
        yield folder, folder
        return
    if alone:
        raise UserError(f"{run} holds an adapter alone: run `stepdistill export {run} --what merged` first")
    if not (folder.parent / "recipe.yaml").is_file():
        raise UserError(
            f"{run} is no run folder, from which the adapter alone could be exported: give that one"
        )
    from stepdistill.training.distil import export_run

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".adapter-") as place:
        yield export_run(folder.parent, Path(place) / "student", ["export.what=adapter"]), folder


def prepare(
    folder: Path,
    repo: str,
    *,
    home: Path | None = None,
    without_adapter: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
) -> HubFolder:
    """What is pushed of a student.

    Args:
        folder: of the student.
        repo: OWNER/NAME.
        home: where the run has its student, beside the recipe that names the teacher; None is the folder.
        without_adapter: leave out the LoRA that lies beside merged weights.
        base_model: the teacher on the Hub; None is the one of the recipe, if that is on the Hub.
        licence: of the student, a name that the Hub knows; None is the teacher's.

    Raises:
        UserError: a file was altered, or a path of this disk is in one.
    """
    manifest = check_unaltered(folder)
    names = [name for name in manifest["files"] if not (without_adapter and name in (LORA, KOHYA))]
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(names)}
    manifest["files"] = {name: manifest["files"][name] for name in names}
    teacher = _teacher_of(home or folder, folder)
    source = local_folder(teacher) if teacher is not None else None
    if base_model is None and teacher is not None and not Path(teacher).exists() and teacher.count("/") == 1:
        base_model = teacher
    if (folder / ADAPTER).is_file():
        of = json.loads((folder / ADAPTER).read_text("utf-8"))
        pipeline = str(of["pipeline"])
        if base_model is None:
            raise UserError(
                f"{folder} is an adapter for {of['teacher']}, which nobody else finds: give --base-model OWNER/NAME"
            )
        content = (json.dumps({**of, "teacher": base_model}, indent=1) + "\n").encode()
        files[ADAPTER], manifest["files"][ADAPTER] = content, hashlib.sha256(content).hexdigest()
    else:
        pipeline = pipeline_class(folder)
    told = {"license": licence} if licence else licence_of(source) if source is not None else {}
    whose = "its teacher" if teacher is None else f"the teacher {teacher}"
    warnings = () if told else (f"no licence of {whose} is known: give --license NAME",)
    if source is not None:
        files |= {file.name: file for file in sorted(source.glob("LICENSE*")) if file.is_file()}
    card = (folder / CARD).read_text("utf-8")
    if base_model is not None and teacher is not None:
        card = card.replace(str(teacher), base_model)
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
    files[CARD] = hub_card(
        card,
        repo=repo,
        pipeline=pipeline,
        call=manifest["call"],
        files=files,
        base_model=base_model,
        licence=told,
    ).encode()
    _check_paths(files)
    return HubFolder(repo, dict(sorted(files.items())), warnings)


def _teacher_of(home: Path, folder: Path) -> str | None:
    """The teacher as the run's recipe names it, else as the adapter or the card does; None where nobody does."""
    import yaml

    recipe = home.parent / "recipe.yaml"
    if recipe.is_file():
        return str(yaml.safe_load(recipe.read_text("utf-8"))["teacher"])
    if (folder / ADAPTER).is_file():
        return str(json.loads((folder / ADAPTER).read_text("utf-8"))["teacher"])
    found = metadata((folder / CARD).read_text("utf-8")).get("base_model")
    return None if found is None else str(found)


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
