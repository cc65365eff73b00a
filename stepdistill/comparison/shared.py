"""What runs of a comparison share: pairs of one teacher, drawn once, and warm starts of one kind, made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.comparison.plan import Entry
from stepdistill.recipes.recipe import Recipe
from stepdistill.training.identity import ResolvedRecipe, resolve

POOLS, WARM_STARTS = "pairs", "warm_starts"
"""In the folder of the comparison: the pairs that its runs share, and their warm starts."""


def pool_of(recipe: Recipe) -> str | None:
    """A name for the pairs that a recipe draws, equal for recipes that draw the same ones with the same states; None
    where it draws none, or says where they lie."""
    from stepdistill.losses.contract import MethodOptions, PairOptions

    resolved = resolve(recipe)
    options = resolved.options
    needs = options.needs | recipe.terms.needs
    if "pairs" not in needs or recipe.data.pairs is not None:
        return None
    drawn = options if isinstance(options, PairOptions) else PairOptions(guidance=options.guidance)
    content = [
        recipe.teacher,
        recipe.family,
        options.model_dump(mode="json", include=set(MethodOptions.model_fields)),
        drawn.model_dump(mode="json", include=set(PairOptions.model_fields)),
        recipe.data.model_dump(mode="json", exclude={"damaged", "images"}),
        recipe.train.model_dump(mode="json", include={"seed", "precision", "teacher_precision"}),
        recipe.student.model_dump(mode="json", include={"base"}),
        _states(resolved) if "states" in needs else [],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _states(resolved: ResolvedRecipe) -> list[Any]:
    """What the times follow from at which pairs keep states."""
    from stepdistill.losses.contract import Method

    recipe, kind = resolved.recipe, resolved.kind
    times = list(recipe.student.times or kind.usual_times(recipe.student.steps))
    return times[1:] if kind.pair_times is Method.pair_times else [recipe.method, recipe.options, times]


def warm_start_of(recipe: Recipe) -> str | None:
    """A name for the warm start of a recipe, equal for recipes that make the same; None where it shares none."""
    from stepdistill.training.warm_starts import settings_of

    found = settings_of(resolve(recipe))
    return None if found is None else json.dumps(found, sort_keys=True)


def with_shared(entries: Sequence[Entry], folder: Path) -> list[Entry]:
    """The runs, each drawing its pairs into a pool under ``folder`` that is that of every run with the same pairs, and
    keeping its warm start there, or taking it from there."""
    found = []
    for entry in entries:
        pool = pool_of(entry.recipe)
        own = entry if pool is None else entry.set("data.pairs", folder / POOLS / pool)
        keeps = own.recipe.train.warm_starts is None and warm_start_of(own.recipe) is not None
        found.append(own.set("train.warm_starts", folder / WARM_STARTS) if keeps else own)
    return found


def told(entries: Sequence[Entry]) -> list[str]:
    """What is made once for several runs, a sentence each."""
    lines = []
    for what, name_of in (("The same pairs", pool_of), ("The same warm start", warm_start_of)):
        by_name: dict[str, list[str]] = {}
        for entry in entries:
            if (name := name_of(entry.recipe)) is not None:
                by_name.setdefault(name, []).append(entry.name)
        lines += [f"{what}, made once: {', '.join(names)}." for names in by_name.values() if len(names) > 1]
    return [*lines, ALL_COUNT] if lines else []


ALL_COUNT = "Passes, and the time of a warm start, count for each run as if it had made its own."
