"""``stepdistill ls`` and ``cp``: what is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stepdistill.errors import UserError

Kind = Literal["all", "teachers", "methods", "recipes", "suites", "families"]


def list_names(kind: Annotated[Kind, typer.Argument(help="What to list.")] = "all") -> None:
    """List what is shipped: teachers, methods, recipes, suites, families."""
    from stepdistill.networks.pipeline_files import pipeline_class
    from stepdistill.system import shipped
    from stepdistill.system.emoji import embedded_teachers

    tables: dict[str, dict[str, str]] = {}
    if kind in ("all", "teachers"):
        tables["teachers"] = {name: pipeline_class(path) for name, path in embedded_teachers().items()}
    if kind in ("all", "methods"):
        tables["methods"] = shipped.module_summaries("methods")
    if kind == "methods":  # what a method needs is in its class, so that this alone imports torch
        from stepdistill.methods import needs

        told = {name: needs(name) for name in tables["methods"]}
        width = max(map(len, told.values()))
        tables["methods"] = {
            name: f"{told[name].ljust(width)}  {text}" for name, text in tables["methods"].items()
        }
    if kind in ("all", "recipes"):
        real = {name: shipped.of_real_teacher(path) for name, path in shipped.recipe_files().items()}
        for title, wanted in (("recipes for a laptop", False), ("recipes for real teachers", True)):
            files = shipped.recipe_files().items()
            tables[title] = {name: shipped.header(path) for name, path in files if real[name] == wanted}
    if kind in ("all", "suites"):
        tables["suites"] = {name: shipped.header(path) for name, path in shipped.suite_files().items()}
    if kind in ("all", "families"):
        tables["families"] = shipped.module_summaries("families")
    for title, table in tables.items():
        if len(tables) > 1:
            print(f"{title}:")
        width = max(map(len, table), default=0)
        for name, summary in table.items():
            print(f"  {name.ljust(width)}  {summary}".rstrip())


def copy_recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    dest: Annotated[Path, typer.Argument(help="File or folder to copy it to.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    from stepdistill.errors import did_you_mean
    from stepdistill.system.shipped import recipe_files

    shipped = recipe_files()
    name = recipe.removesuffix(".yaml")
    if name not in shipped:
        raise UserError(f"{recipe} is not a shipped recipe {did_you_mean(name, shipped)}")
    target = dest / f"{name}.yaml" if dest.is_dir() else dest
    if target.exists():
        raise UserError(f"{target} exists already: give another name")
    try:
        target.write_bytes(shipped[name].read_bytes())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    print(target)
