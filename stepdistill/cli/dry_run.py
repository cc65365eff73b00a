"""``stepdistill train --dry-run``: what a recipe comes to, before it costs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.recipes.recipe import Recipe
    from stepdistill.training.identity import ResolvedRecipe


def dry_run(recipe: Recipe) -> None:
    """Prints the resolved recipe, what of it is not as shipped, and what it needs in memory, disk and time.

    Raises:
        UserError: the recipe would be refused before its first update.
    """
    from stepdistill.training.identity import resolve, resolved_yaml
    from stepdistill.training.preflight import check_recipe

    check_recipe(recipe)
    resolved = resolve(recipe)
    print(resolved_yaml(resolved))
    print(recipe.announced)
    print(_changes(recipe))
    for line in (*_planned(recipe), *_timed(resolved)):
        print(line)
    print("dry run: nothing was written")


def _changes(recipe: Recipe) -> str:
    """The keys that are not as in the shipped recipe, or, without one, not at their defaults."""
    from stepdistill.recipes.recipe import Recipe, load_recipe
    from stepdistill.recipes.reference import in_yaml
    from stepdistill.system.shipped import recipe_files
    from stepdistill.training.identity import differences, resolve

    shipped = recipe.source in recipe_files()
    named = f"{recipe.source} as shipped" if shipped else "the defaults"
    like = load_recipe(recipe.source) if shipped else Recipe(teacher=recipe.teacher, method=recipe.method)
    keys = differences(like, recipe)
    if not keys:
        return f"differs from {named}: in nothing"
    now = resolve(recipe).recipe.model_dump(mode="json")
    before = (resolve(like).recipe if like.method == recipe.method else like).model_dump(mode="json")
    said = [f"{key} {in_yaml(_at(now, key))} (there {in_yaml(_at(before, key))})" for key in keys]
    return f"differs from {named}: {', '.join(said)}"


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _planned(recipe: Recipe) -> list[str]:
    """Memory and disk, and of a teacher too large to try the hours."""
    import torch

    from stepdistill.planning.plan import plan
    from stepdistill.planning.table import times
    from stepdistill.system.emoji import embedded_teachers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = plan(recipe, device="cuda" if device == "cuda" else "cpu")
    except UserError as error:
        return [f"memory and disk: not planned: {error}"]
    disk = ", ".join(f"{name} {_gib(size)}" for name, size in found.disk.items())
    lines = [f"memory: {_gib(found.peak)} on {device}, at the peak", f"disk: {disk}"]
    if recipe.teacher not in embedded_teachers():
        lines += [f"time: {line}" for line in times(found)]
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _timed(resolved: ResolvedRecipe) -> list[str]:
    """Pairs and updates; of an embedded teacher with their time, from a trial on this machine."""
    from stepdistill.losses.contract import PairOptions
    from stepdistill.planning.table import duration
    from stepdistill.system.emoji import embedded_teachers

    recipe, options = resolved.recipe, resolved.options
    drawn = options if isinstance(options, PairOptions) else PairOptions()
    if recipe.teacher not in embedded_teachers():
        needed = "pairs" in options.needs | recipe.terms.needs
        return [_pairs(drawn.pairs if needed else 0, drawn), f"updates: {recipe.train.updates:,}"]
    from stepdistill.training.trial import trial

    found = trial(resolved)
    each = ", ".join(f"{count:,} of the {name}" for name, count in found.updates.items())
    time = f"{duration(found.update_seconds / 3600)} of updates"
    if found.pairs:
        time = f"{duration(found.pair_seconds / 3600)} of pairs and {time}"
    return [
        _pairs(found.pairs, drawn),
        f"updates: {recipe.train.updates:,}: {each}",
        f"time: {time}, from three units tried on this machine; exporting and measuring come after them",
    ]


def _pairs(count: int, options: Any) -> str:
    from stepdistill.diffusion.solvers import calls_of

    if not count:
        return "pairs of the teacher: none"
    return f"pairs of the teacher: {count:,} of {calls_of(options.pair_solver, options.pair_steps)} network calls"
