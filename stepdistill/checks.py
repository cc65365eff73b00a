"""What can be seen to be wrong with a run before anything slow is imported or loaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import cast

from stepdistill.captions import read_metadata
from stepdistill.embedded import embedded_teachers, teacher_folder
from stepdistill.errors import UserError, did_you_mean
from stepdistill.pipeline_files import check_files
from stepdistill.prompts import read_prompts
from stepdistill.recipe import Recipe

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_recipe(recipe: Recipe, resumed: Path | None = None) -> None:
    """The teacher, the prompts and the images that a recipe names are there.

    Args:
        recipe: what names them.
        resumed: the run folder that is gone on with, if one is.

    Raises:
        UserError: one of them is not.
    """
    try:
        _check_inputs(recipe)
    except UserError as error:
        if resumed is None or (begun := _begun_in(resumed)) in (None, str(Path.cwd())):
            raise
        raise UserError(
            f"{error}; relative paths of the run {resumed} start at {begun}, where it was trained: resume it from there"
        ) from None


def _begun_in(run: Path) -> str | None:
    """The working directory of the process that wrote the run's last checkpoint, where it says so."""
    states = sorted(run.glob("checkpoints/step-*/state.json"))
    try:
        return cast("str | None", json.loads(states[-1].read_text()).get("folder"))
    except (IndexError, OSError, ValueError):
        return None


def _check_inputs(recipe: Recipe) -> None:
    _check_teacher(recipe.teacher)
    if recipe.data.prompts is not None:
        read_prompts(Path(recipe.data.prompts))
    if recipe.data.images is not None:
        _check_images(Path(recipe.data.images))


def find_teacher(name: str) -> str:
    """What ``from_pretrained`` loads a teacher from: the folder that the name means, or a Hub name.

    Raises:
        UserError: it is neither.
    """
    _check_teacher(name)
    return str(_local_pipeline(name) or name)


def find_pipeline(name: str | Path) -> Path:
    """The diffusers folder of an embedded teacher's name, a diffusers folder, or a run folder (its student).

    Raises:
        UserError: the name is none of these.
    """
    if (found := _local_pipeline(name)) is not None:
        return found
    if Path(name).is_dir():
        raise UserError(f"{name} is not a diffusers pipeline: the folder has no model_index.json")
    known = did_you_mean(str(name), embedded_teachers())
    raise UserError(f"pipeline {name} does not exist {known}; or give a folder")


def pipeline_or_images(name: str | Path) -> Path | None:
    """The folder of a pipeline, or None where the name is of images.

    Raises:
        UserError: it is of neither, or of a run that has no student yet.
    """
    try:
        return find_pipeline(name)
    except UserError:
        from stepdistill.image_sources import is_source

        if is_source(name) and not (Path(name).expanduser() / "recipe.yaml").is_file():
            return None
        raise


def _local_pipeline(name: str | Path) -> Path | None:
    if (embedded := teacher_folder(str(name))) is not None:
        return embedded
    folders = (Path(name).expanduser(), Path(name).expanduser() / "student")
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def _check_teacher(name: str) -> None:
    if (found := _local_pipeline(name)) is not None:
        check_files(found, f"teacher {name}")
        return
    if Path(name).is_dir():
        raise UserError(f"teacher {name} is not a diffusers pipeline: the folder has no model_index.json")
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


def check_writable(folder: Path) -> None:
    """The folder can be written to; it is made when it is missing.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output folder {folder} cannot be written: {error.strerror}; give another --output"
        ) from None


def check_folder(folder: Path) -> None:
    """As :func:`check_writable`, and leaves the disk as it was.

    Raises:
        UserError: it cannot be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        check_writable(folder)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # another run may be in it by now
                place.rmdir()


def check_file(path: Path) -> None:
    """A file that is written after minutes of work can be written.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: the folder {path.parent} is not there or cannot be written")


def check_output(folder: Path, *, resume: bool) -> None:
    """The run folder can be made and written to, and does not hold another run. Leaves the disk as it was.

    Raises:
        UserError: it cannot be written to, or it holds a run and ``resume`` is off, or none and ``resume`` is on.
    """
    begun = (folder / "recipe.yaml").is_file()
    # A run that failed before its first checkpoint left nothing worth keeping.
    holds_run = begun and any((folder / name).exists() for name in ("checkpoints", "student", "report.json"))
    if resume and not begun:
        raise UserError(
            f"--resume: {folder.absolute()} holds no run (it has no recipe.yaml); give the run's folder as --output"
        )
    if holds_run and not resume:
        raise UserError(
            f"{folder} holds a run already: add --resume to go on with it, or give another --output"
        )
    check_folder(folder)


def next_run_folder(root: Path, name: str) -> Path:
    """``root/name``, or ``root/name-2``, ``-3``, ...: the first that does not exist."""
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder


def newest_run_folder(root: Path, name: str) -> Path:
    """The run folder of this name with the highest number.

    Raises:
        UserError: there is none.
    """
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    numbered = {
        int(match[1] or 1): folder
        for folder in (root.iterdir() if root.is_dir() else ())
        if (match := pattern.fullmatch(folder.name)) and (folder / "recipe.yaml").is_file()
    }
    if not numbered:
        raise UserError(
            f"--resume: there is no run {(root / name).absolute()} to go on with; give its folder as --output"
        )
    return numbered[max(numbered)]


def _check_images(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"data.images: {folder} is not a folder; give the folder that holds the images")
    if not any(folder.iterdir()):
        raise UserError(f"data.images: {folder} is empty")
    read_metadata(folder)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model_index.json"), str)
