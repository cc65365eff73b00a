"""What can be seen to be wrong with a run before anything slow is imported or loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stepdistill.data.captions import read_metadata
from stepdistill.data.partition import check_partition, place_of
from stepdistill.data.prompts import is_tar, open_prompts, read_rich
from stepdistill.errors import UserError
from stepdistill.networks.find import check_teacher, find_lora, local_folder
from stepdistill.networks.pipeline_files import pipeline_class
from stepdistill.pictures.given import check_there
from stepdistill.recipes.recipe import WEAK, Recipe
from stepdistill.recipes.rewards import own_reward
from stepdistill.recipes.sections import AgainstTeacherOptions
from stepdistill.system.emoji import embedded_teachers
from stepdistill.system.files import check_folder
from stepdistill.system.parsing import parse_json
from stepdistill.system.run_folder import RunFolder, read_status
from stepdistill.system.shipped import suite_file


def check_recipe(recipe: Recipe, resumed: Path | None = None) -> None:
    """The teacher, the prompts and the images that a recipe names and reads are there.

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
    states = sorted(RunFolder(run).checkpoints.glob("step-*/state.json"))
    try:
        folder = parse_json(states[-1].read_text()).get("folder")
    except (IndexError, OSError, ValueError, AttributeError):
        return None
    return folder if isinstance(folder, str) else None


def _check_inputs(recipe: Recipe) -> None:
    check_teacher(recipe.teacher)
    _check_further(recipe)
    _check_start(recipe)
    for name in recipe.terms.rewards:
        if (own := own_reward(name)) and not own.file.is_file():
            raise UserError(f"terms.reward {name}: there is no such file")
    if recipe.data.prompts is not None:
        check_there(open_prompts(Path(recipe.data.prompts)), "data.prompts")
    if recipe.data.rich is not None:
        read_rich(Path(recipe.data.rich))
    if recipe.data.part is not None:
        place_of(recipe.data.part)
        check_partition(recipe.data.partition)
    if recipe.data.images is not None:
        try:
            _check_images(Path(recipe.data.images))
        except UserError as error:
            _unless_unread(recipe, error)
    check_evaluation(recipe)


def _check_further(recipe: Recipe) -> None:
    """Further teachers and the files of their prompts are there."""
    for name, place in recipe.teachers.items():
        try:
            if find_lora(place) is None:
                check_teacher(place)
        except UserError as error:
            raise UserError(f"teachers.{name}: {error}") from None
        if name != WEAK:
            open_prompts(Path(recipe.data.route[name]), f"data.route.{name}")


def _check_start(recipe: Recipe) -> None:
    """What the student starts as is there."""
    if recipe.student.start is not None:
        try:
            check_teacher(recipe.student.start)
        except UserError as error:
            raise UserError(f"student.start: {error}") from None


def _unless_unread(recipe: Recipe, error: UserError) -> None:
    """Raises what is wrong with the images of a recipe that reads them, with the way to do without, if there is one."""
    from stepdistill.training.identity import resolve

    options = resolve(recipe).options
    if "images" not in options.needs | recipe.terms.needs:
        return
    without = "source" in type(options).model_fields and "images" not in recipe.terms.needs
    hint = (
        "; or without images, from the teacher's own pictures: --set options.source=pairs" if without else ""
    )
    raise UserError(f"{error}{hint}") from None


def check_evaluation(recipe: Recipe) -> None:
    """What the student is measured by at the end of the run is there.

    Raises:
        UserError: the suite is none, one of its files is missing, it is of another kind of teacher, or there is no such
            feature network.
    """
    if isinstance(recipe.evaluate, str):
        _check_suite(recipe.evaluate, recipe.teacher)
    elif recipe.evaluate and recipe.teacher not in embedded_teachers():
        _check_networks(recipe.against_teacher)


def _check_networks(options: AgainstTeacherOptions) -> None:
    """The networks that a student is measured in at the end of the run are here, where the recipe names them."""
    for key, name in (("features", options.features), ("texts", options.texts)):
        if name not in ("auto", "none"):
            from stepdistill.features.load import check_weights

            try:
                check_weights(name)
            except UserError as error:
                raise UserError(f"against_teacher.{key}: {error}") from None


def _check_suite(name: str, teacher: str) -> None:
    """The suite that a student is measured by at the end of the run is whole, and fits its teacher."""
    try:
        suite_file(name)  # a slip of the pen costs no import of torch
        from stepdistill.errors import MissingWeights
        from stepdistill.evaluation.suite import load_suite
        from stepdistill.features.load import check_weights

        suite = load_suite(name)
        if not (suite.n and suite.resolution):
            raise UserError(
                f"suite {suite.label} leaves n or resolution open: it measures images; a student needs both"
            )
        suite.prompt_list()
        suite.reference_file()
        suite.cmmd_reference_file()
        suite.second_reference_file()
        missing: list[MissingWeights] = []
        asked = set(suite.asked(suite.features).values())
        for network in sorted(asked):
            try:
                check_weights(network)
            except MissingWeights as error:
                missing.append(error)
        if len(missing) == len(asked):  # where one is left the others' metrics are left out
            raise missing[0]
        folder = local_folder(teacher)
        kind = folder and pipeline_class(folder)
        if kind and (reason := _misfit(kind, suite.prompts is not None)) is not None:
            raise UserError(
                f"suite {suite.label} {reason}: take another one, true, or false for no evaluation"
            )
    except UserError as error:
        raise UserError(f"evaluate: {error}") from None


def _misfit(kind: str, prompts: bool) -> str | None:
    """Why a suite with or without prompts does not measure what a pipeline of this class draws."""
    import inspect

    import diffusers

    pipeline = getattr(diffusers, kind, None)
    if pipeline is None:  # what is said of it when it is loaded says more
        return None
    takes = "prompt" in inspect.signature(pipeline.__call__).parameters
    if takes == prompts:
        return None
    return f"has no prompts, from which {kind} draws" if takes else f"has prompts, which {kind} does not take"


def check_output(folder: Path, *, resume: bool) -> None:
    """The run folder can be made and written to, and does not hold another run. Leaves the disk as it was.

    Raises:
        UserError: it cannot be written to, or it holds a run and ``resume`` is off, or none and ``resume`` is on.
    """
    place = RunFolder(folder)
    place.check_layout()
    begun = place.recipe.is_file()
    # A run that ended before its first checkpoint was whole left nothing worth keeping.
    saved = any(place.checkpoints.glob("step-*"))
    holds_run = begun and (saved or place.student.exists() or place.report.exists())
    if resume and not begun:
        raise UserError(
            f"--resume: {folder.absolute()} holds no run (it has no recipe.yaml); give the run's folder as --output"
        )
    status = read_status(folder)
    if status is not None and status.under_way and status.pid != os.getpid():
        raise UserError(
            f"{folder} is the folder of a run that is under way (process {status.pid}, {status.phase}): wait for it, "
            "stop it, or give another --output"
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


def _check_images(place: Path) -> None:
    if place.is_file() and is_tar(place):
        return
    if not place.is_dir():
        raise UserError(
            f"data.images: {place} is not a folder; give the folder that holds the images, or a webdataset .tar"
        )
    if not any(place.iterdir()):
        raise UserError(f"data.images: {place} is empty")
    read_metadata(place)
