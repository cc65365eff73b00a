"""A run's copies of the Python files that its recipe names: a method, a family or a reward of the user's own.

RUN/method.py is what the run was begun with, whatever becomes of the file. Imports no torch.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.rewards import own_reward
from stepdistill.system.files import sha256_of

KEYS = {"method": "method.py", "family": "family.py", "terms.reward": "reward.py"}
"""What the copies are called, by key."""


def own_files(recipe: Recipe) -> dict[str, Path]:
    """The files by the key that names them; empty where all is shipped."""
    named = {"method": recipe.method, "family": recipe.family or ""}
    found = {key: Path(name) for key, name in named.items() if name.endswith(".py")}
    rewards = [own for name in recipe.terms.rewards if (own := own_reward(name))]
    return {**found, "terms.reward": rewards[0].file} if rewards else found


def copy_in(run: Path, key: str) -> Path:
    """Where a run keeps the file of a key."""
    return run / KEYS[key]


def copies(run: Path) -> dict[str, Path]:
    """The copies that a run has, by key."""
    return {key: file for key in KEYS if (file := copy_in(run, key)).is_file()}


def keep_own_files(recipe: Recipe, run: Path) -> None:
    """Copies the files into the run's folder."""
    for key, file in own_files(recipe).items():
        copy = copy_in(run, key)
        if not (copy.is_file() and copy.samefile(file)):
            shutil.copyfile(file, copy)


def check_own_files(recipe: Recipe, run: Path) -> None:
    """The files of a run that is gone on with are what it was begun with.

    Raises:
        UserError: one was changed, saying how the run goes on with its copy.
    """
    for key, file in own_files(recipe).items():
        copy = copy_in(run, key)
        if copy.is_file() and sha256_of(copy) != sha256_of(file):
            raise UserError(
                f"--resume: {key} {file} differs from {copy}, with which the run was begun: put it back, or go on with "
                f"the copy by --set {key}={_in_place(recipe, key, copy)}"
            )


def own_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files, by key."""
    return {key: sha256_of(file) for key, file in own_files(recipe).items()}


def as_begun(recipe: Recipe, run: Path) -> Recipe:
    """The recipe with the run's copies in the place of its files: two that differ in where these lie are one."""
    there = copies(run)
    changed = {key: _in_place(recipe, key, there[key]) for key in own_files(recipe) if key in there}
    if reward := changed.pop("terms.reward", None):
        recipe = recipe.model_copy(update={"terms": recipe.terms.model_copy(update={"reward": reward})})
    return recipe.model_copy(update=changed)


def _in_place(recipe: Recipe, key: str, copy: Path) -> str | tuple[str, ...]:
    """The value of a key with a copy in the place of its file."""
    if key != "terms.reward":
        return str(copy)
    told = tuple(
        f"{copy}:{own.function}" if (own := own_reward(name)) else name for name in recipe.terms.rewards
    )
    return told[0] if isinstance(recipe.terms.reward, str) else told
