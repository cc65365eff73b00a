"""What a recipe amounts to with every default written out, and whether two are the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.sections import TrainOptions


def identity(recipe: Recipe) -> Recipe:
    """The recipe without what cannot move a weight, and so may change between two parts of one run: where its folder
    lies, what is evaluated, how long it may take, what is kept, drawn and tracked."""
    plain = TrainOptions()
    names = ("budget_seconds", "keep", "sheet_every", "tracker")
    train_options = recipe.train.model_copy(update={name: getattr(plain, name) for name in names})
    return resolved(recipe).model_copy(update={"output": None, "evaluate": True, "train": train_options})


def resolved(recipe: Recipe) -> Recipe:
    """The same recipe with every option of its method written out."""
    from stepdistill.methods import method_options

    return recipe.model_copy(update={"options": method_options(recipe).model_dump(mode="json")})


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(
        resolved(recipe).model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110
    )


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Key paths at which two recipes differ, in the recipe's order; an option left out equals its default."""
    if a.method == b.method:
        a, b = resolved(a), resolved(b)
    return _differences(a.model_dump(mode="json"), b.model_dump(mode="json"), "")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key in dict.fromkeys([*a, *b]):
        path = f"{prefix}{key}"
        if key not in a or key not in b:
            found.append(path)
        elif isinstance(a[key], dict) and isinstance(b[key], dict):
            found += _differences(a[key], b[key], f"{path}.")
        elif a[key] != b[key]:
            found.append(path)
    return found
