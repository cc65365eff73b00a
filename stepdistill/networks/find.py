"""What a name stands for: an embedded teacher, a pipeline folder, a run's student, a Hub name. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stepdistill.errors import UserError, did_you_mean
from stepdistill.networks.hub import SINGLE, of_single_file
from stepdistill.networks.pipeline_files import ADAPTER, INDEX, LORA, check_files
from stepdistill.system.emoji import embedded_teachers, teacher_folder
from stepdistill.system.run_folder import RunFolder

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_teacher(name: str) -> str:
    """What ``from_pretrained`` loads a teacher from: the folder that the name means, or a Hub name.

    Raises:
        UserError: it is neither.
    """
    check_teacher(name)
    return str(_local_pipeline(name) or name)


def find_pipeline(name: str | Path) -> Path:
    """The folder that is meant by an embedded teacher's name, a diffusers folder, one of an adapter alone, or a run
    folder (its student).

    Raises:
        UserError: the name is none of these.
    """
    if (found := _local_pipeline(name, INDEX, ADAPTER)) is not None:
        return found
    if Path(name).expanduser().is_dir():
        check_no_runs(name)
        raise UserError(f"{name} is not a diffusers pipeline: the folder has no model_index.json")
    known = did_you_mean(str(name), embedded_teachers())
    raise UserError(f"pipeline {name} does not exist {known}; or give a folder")


def check_no_runs(name: str | Path) -> None:
    """A folder is neither a run without a student nor a folder of runs: which one is meant, its user must say.

    Raises:
        UserError: it is one of them.
    """
    folder = Path(name).expanduser()
    if RunFolder(folder).recipe.is_file():
        raise UserError(
            f"{name} is a run without a student so far: wait for its end, go on with `stepdistill train --resume "
            f"--output {name}`, or write one with `stepdistill export {name}`"
        )
    runs = sorted(
        place.name
        for place in folder.iterdir()
        if RunFolder(place).recipe.is_file() and not place.is_symlink()
    )
    if runs:
        shown = ", ".join(runs[:8]) + ", ..." * (len(runs) > 8)
        raise UserError(
            f"{name} holds {len(runs)} run{'s' * (len(runs) > 1)}: {shown}: give one of them, such as "
            f"{folder / runs[0]}"
        )


def _local_pipeline(name: str | Path, *marks: str) -> Path | None:
    if (embedded := teacher_folder(str(name))) is not None:
        return embedded
    folders = (Path(name).expanduser(), Path(name).expanduser() / "student")
    marked = (folder for folder in folders for mark in marks or (INDEX,) if (folder / mark).is_file())
    return next(marked, None)


def local_folder(name: str | Path) -> Path | None:
    """The folder on this disk that a name means; of a Hub name, that in the Hub's cache, None where it is not there."""
    return _local_pipeline(name) or _cached_folder(str(name))


def check_teacher(name: str) -> None:
    if (found := _local_pipeline(name)) is not None:
        check_files(found, f"teacher {name}")
        return
    if Path(name).is_dir():
        if _local_pipeline(name, ADAPTER) is not None:
            raise UserError(
                f"teacher {name} is a student that is an adapter alone: export it again with --what merged"
            )
        raise UserError(f"teacher {name} is not a diffusers pipeline: the folder has no model_index.json")
    if Path(name).is_file() and Path(name).suffix in SINGLE:
        raise UserError(f"teacher {name} {of_single_file(name)}")
    # A path that was mistyped looks like a Hub name unless its first part is a folder here.
    if not _HUB_NAME.fullmatch(name) or Path(name).parent.is_dir():
        known = did_you_mean(name, embedded_teachers())
        raise UserError(
            f"teacher {name} does not exist {known}; or give a diffusers folder, or a Hub name owner/name"
        )
    if _is_offline() and not _is_cached(name):
        raise UserError(
            f"teacher {name} is neither a folder here nor in the Hub's cache, and HF_HUB_OFFLINE is set"
        )


def find_lora(name: str) -> Path | None:
    """The file of a LoRA that a name means: a .safetensors, or a folder that holds one and no pipeline; None for what
    is none."""
    place = Path(name).expanduser()
    if place.is_file() and place.suffix == ".safetensors":
        return place
    file = place / LORA
    return file if file.is_file() and _local_pipeline(name) is None else None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_cached(name: str) -> bool:
    return _cached_folder(name) is not None


def _cached_folder(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, INDEX) if _HUB_NAME.fullmatch(name) else None
    return Path(found).parent if isinstance(found, str) else None
