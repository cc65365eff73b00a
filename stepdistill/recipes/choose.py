"""Which shipped recipe stands for a method on a teacher, and what is said of a recipe before it runs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from stepdistill.system.parsing import parse_json
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.shipped import content_folder, header, recipe_files

DEFAULT_TEACHER = "emoji"


def recipe_of(
    method: str, teacher: str, budget: float = 0.0, *, quick: bool = False, foreign: bool = True
) -> str | None:
    """The shipped recipe that stands for a method on a teacher, or None.

    Of the recipes of that method on that teacher, but for those of a part of the prompts: METHOD_TEACHER before others,
    the larger before the smaller; with a budget, the first whose training took no longer when its result in
    train/results was made (the smallest where none did).

    Args:
        method: a shipped method's name.
        teacher: as a recipe names it, or a folder of that name.
        budget: seconds of training; 0 sets no limit.
        quick: METHOD_TEACHER_quick before all others.
        foreign: a teacher without recipes of its own takes those of the embedded one.
    """
    trees = {name: tree_of(file) for name, file in recipe_files().items()}
    for place in dict.fromkeys((teacher, Path(teacher).name, *([DEFAULT_TEACHER] if foreign else []))):
        sizes = {
            name: _samples(tree)
            for name, tree in trees.items()
            if (tree.get("method"), tree.get("teacher")) == (method, place)
            and "part" not in tree.get("data", {})
        }
        if quick and f"{method}_{place}_quick" in sizes:
            return f"{method}_{place}_quick"
        if sizes:
            ranked = sorted(sizes, key=lambda name: (name != f"{method}_{place}", -sizes[name]))
            fitting = [name for name in ranked if not budget or _measured_seconds(name) <= budget]
            return fitting[0] if fitting else min(ranked, key=lambda name: sizes[name])
    return None


def announcement(method: str, teacher: str, source: str | None, changed: bool) -> str:
    """What is said before a recipe runs: which it is and how long it takes, or which defaults stand in for one.

    Args:
        method, teacher: of the run.
        source: the shipped recipe's name or the file; None where there is none.
        changed: whether keys of it were set.
    """
    if source is not None:
        file = recipe_files().get(source)
        found = re.search(r"((?:about|two to) \w+ minutes on [^.,|]+)", header(file)) if file else None
        if file is None or found is None:
            return f"recipe: {source}"
        other = changed or tree_of(file).get("teacher") != teacher
        return f"recipe: {source} ({'as shipped: ' if other else ''}{found[1].strip()})"
    named = Path(method).stem
    said = f"recipe: none is shipped for {named} on {teacher}: defaults of {named} and of train are taken"
    others = [name for name, file in recipe_files().items() if tree_of(file).get("method") == method]
    real = [name for name in others if "/" in tree_of(recipe_files()[name]).get("teacher", "")]
    if others:
        said += f"; to start from: {', '.join((real or others)[:3])}"
    return f"{said} (`stepdistill ls keys` lists the keys)"


@cache
def tree_of(file: Path) -> dict[str, Any]:
    """A shipped recipe as it is written."""
    tree: dict[str, Any] = parse_yaml(file.read_text(encoding="utf-8")) or {}
    return tree


def _samples(tree: dict[str, Any]) -> int:
    train = tree.get("train") or {}
    return int(train.get("updates", 1000)) * int(train.get("batch", 64))


def _measured_seconds(name: str) -> float:
    """Training time of a recipe's shipped result; 0 where there is none."""
    file = content_folder("train") / "results" / f"{name}.json"
    seconds = parse_json(file.read_text(encoding="utf-8")).get("train_seconds", 0) if file.is_file() else 0
    return float(seconds)
