"""What a recipe amounts to with every default written out, and whether two are the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from stepdistill.recipes.health_options import HealthOptions
from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.sections import AgainstTeacherOptions, ExportOptions
from stepdistill.recipes.train_options import TrainOptions

if TYPE_CHECKING:
    from stepdistill.losses.contract import Method, MethodOptions


def identity(recipe: Recipe) -> Recipe:
    """The recipe without what cannot move a weight, and so may change between two parts of one run: where its folder
    lies, what is exported and evaluated, how long it may take, what is kept (of activations, too), drawn, read, made
    again, watched and tracked. A rate that a run's health has changed is in its checkpoints."""
    plain = TrainOptions()
    names = ("budget_seconds", "checkpointing", "context_parallel", "keep", "log_every", "parallel")
    free = {name: getattr(plain, name) for name in (*names, "preview_every", "tracker", "warm_starts")}
    train_options = recipe.train.model_copy(update=free)
    data = recipe.data.model_copy(update={"damaged": "refuse"})
    same = {"output": None, "data": data, "export": ExportOptions(), "train": train_options}
    measured = {"evaluate": True, "against_teacher": AgainstTeacherOptions(), "health": HealthOptions()}
    return recipe.model_copy(update={**same, **measured})


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe whose method was found and whose options were checked, once.

    Attributes:
        recipe: with every option of its method written out.
        kind: the method's class.
        options: its options.
    """

    recipe: Recipe
    kind: type[Method]
    options: MethodOptions


def resolve(recipe: Recipe) -> ResolvedRecipe:
    """Finds the recipe's method and checks its options. Imports the method, and torch with it.

    Raises:
        UserError: no such method, an option that it does not have, or a value that it cannot take.
    """
    from stepdistill.methods import find_method, method_options

    options = method_options(recipe)
    written_out = recipe.model_copy(update={"options": options.model_dump(mode="json")})
    return ResolvedRecipe(written_out, find_method(recipe.method), options)


_CHANGED = "# Other than the defaults: "


def changes(recipe: ResolvedRecipe) -> dict[str, Any]:
    """The keys that are not at their defaults, with their values as JSON has them."""
    plain = Recipe(teacher=recipe.recipe.teacher, method=recipe.recipe.method)
    found: dict[str, Any] = {}
    for key in differences(plain, recipe.recipe):
        value: Any = recipe.recipe.model_dump(mode="json")
        for part in key.split("."):
            value = value[part]
        found[key] = value
    found.pop("output", None)
    return found


def resolved_yaml(recipe: ResolvedRecipe) -> str:
    """The recipe with every default written out, as YAML that :func:`load_recipe` reads back to an equal recipe. Its
    first line names the keys that are not at their defaults."""
    content = recipe.recipe.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    return f"{_CHANGED}{', '.join(changes(recipe)) or 'none'}\n{text}"


def changed_keys(text: str) -> tuple[str, ...]:
    """The keys that the first line of such a YAML text names."""
    line = text.partition("\n")[0]
    named = line.removeprefix(_CHANGED)
    return () if named in (line, "none") else tuple(named.split(", "))


def differences(a: Recipe, b: Recipe) -> list[str]:
    """Key paths at which two recipes differ, in the recipe's order; an option left out equals its default."""
    if a.method == b.method:
        a, b = resolve(a).recipe, resolve(b).recipe
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
