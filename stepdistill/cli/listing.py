"""``stepdistill ls`` and ``cp``: what is shipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from stepdistill.errors import UserError

ABOUT_METHODS = """
steps: the usual number; any: a student draws in other numbers, too. needs: beside prompts, and in brackets what options
add: images; pairs of the teacher's, and states of their trajectories; follower: a network or a head that learns from
samples of the student; second time: the network is told where its jump ends. LoRA: yes, merged alone, or no. networks:
in memory, with the teacher; with a LoRA all are adapters on one. passes: calls of networks for a sample of an update,
in the mean and with the default options.
Start with lcm (4 steps, LoRA), dmd (1 step) or phased_dmd (best at 4 steps)."""
TRIED_UPDATES = 400
"""Updates over which the passes of a method are counted."""

Kind = Literal["all", "teachers", "methods", "recipes", "suites", "families", "keys"]


def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = "all",
    method: Annotated[
        str | None, typer.Argument(help="With keys: the method whose options are listed.")
    ] = None,
) -> None:
    """List what is shipped: teachers, methods, recipes, suites, families; or the keys of a recipe."""
    if method is not None and kind != "keys":
        raise UserError(f"ls {kind} takes no {method}: `stepdistill ls keys METHOD` lists a method's options")
    if kind in ("keys", "methods"):
        _list_keys(method) if kind == "keys" else _list_methods()
        return
    from stepdistill.networks.pipeline_files import pipeline_class
    from stepdistill.system import shipped
    from stepdistill.system.emoji import embedded_teachers

    tables: dict[str, dict[str, str]] = {}
    if kind in ("all", "teachers"):
        tables["teachers"] = {name: pipeline_class(path) for name, path in embedded_teachers().items()}
    if kind in ("all", "methods"):
        tables["methods"] = shipped.module_summaries("methods")
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


def _list_methods() -> None:
    """The methods by their kind: what each is for and needs. Its class says it, so that this imports torch."""
    from stepdistill.methods import find_method, needs
    from stepdistill.system.shipped import module_summaries
    from stepdistill.testing.contract import build
    from stepdistill.testing.passes import passes_of_training

    head = ("method", "steps", "needs", "LoRA", "networks", "passes", "")
    groups: dict[str, list[tuple[str, ...]]] = {"": [head]}
    for name, summary in module_summaries("methods").items():
        kind, built = find_method(name), build(name)
        sampler = built.sampler()
        steps = f"{len(kind.default_times)}{', any' * (sampler.grid is not None)}"
        if sampler.counts is not None:
            steps = ", ".join(map(str, sampler.counts))
        lora = (
            "no"
            if kind.own_network
            else "merged"
            if built.student.two_times or built.student.experts
            else "yes"
        )
        networks = str(1 + len(built.roles.names))
        asked = needs(name).removeprefix("noise, prompts").removeprefix(", ").strip()
        beside = ["follower"] * any(one.follows for one in built.trained().values())
        beside += ["second time"] * built.student.two_times
        plain, _, more = asked.partition("(")
        asked = ", ".join([*filter(None, [plain.strip()]), *beside]) or "nothing"
        asked = f"{asked} ({more}" if more else asked
        made = passes_of_training(kind, kind.Options(), kind.default_times, TRIED_UPDATES).total
        passes = f"{made / TRIED_UPDATES:.1f}"
        row = (name, steps, asked, lora, networks, passes, summary.partition(": ")[2] or summary)
        groups.setdefault(kind.Options.group, []).append(row)
    table = [row for rows in groups.values() for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(6)]
    for title, rows in sorted(groups.items()):
        if title:
            print(f"\n{title}:")
        for cells in rows:
            aligned = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
            print("  ".join([*aligned, cells[6]]).rstrip())
    print(ABOUT_METHODS)


def _list_keys(method: str | None) -> None:
    """Every key with its default, what it takes and one line."""
    from stepdistill.recipes.reference import option_keys, recipe_keys

    if method is None:
        keys = recipe_keys()
    else:
        from stepdistill.methods import find_method

        keys = option_keys(find_method(method).Options)
    paths, defaults, kinds = (
        max(len(getattr(key, what)) for key in keys) for what in ("path", "default", "kind")
    )
    for key in keys:
        text = f"{key.path.ljust(paths)}  {key.default.ljust(defaults)}  {key.kind.ljust(min(kinds, 28))}  {key.line}"
        print(text.rstrip())
    if method is None:
        print("options.*: the method's own, `stepdistill ls keys METHOD`")


def copy_shipped(
    name: Annotated[
        str, typer.Argument(help="Name of a shipped recipe or suite, or own_method: a method to start from.")
    ],
    dest: Annotated[
        str, typer.Argument(help="File or folder to copy it to; a folder that is new ends with a slash.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="A recipe with every key and what it means; a suite always is.")
    ] = False,
) -> None:
    """Copy a shipped recipe or suite, or the template of a method, to edit it."""
    from stepdistill.errors import did_you_mean
    from stepdistill.system.shipped import recipe_files, suite_files, template_files

    recipes, suites, templates = recipe_files(), suite_files(), template_files()
    name = name.removesuffix(".yaml")
    known = {**recipes, **suites, **templates}
    if name not in known:
        near = did_you_mean(name, known, "stepdistill ls")
        raise UserError(f"{name} is not a shipped recipe or suite {near}")
    target, named_folder = Path(dest), dest.endswith(("/", os.sep))
    if named_folder and target.is_file():
        raise UserError(f"{dest} is a file: give a folder, or leave the slash out")
    if named_folder or target.is_dir():
        target /= f"{name}{known[name].suffix}"
    if target.exists():
        raise UserError(f"{target} exists already: give another name")
    if name in suites:
        from stepdistill.evaluation.suite_template import suite_template

        text = suite_template(name, target)
    else:
        text = _in_full(name) if full and name in recipes else known[name].read_text("utf-8")
    try:
        if named_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    print(target)


def _in_full(name: str) -> str:
    """A shipped recipe with every key written out, under its own head."""
    from itertools import takewhile

    from stepdistill.methods import find_method
    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.recipes.reference import option_keys, recipe_keys, written_out
    from stepdistill.system.shipped import recipe_files
    from stepdistill.training.identity import resolve

    recipe, keys = load_recipe(name), recipe_keys()
    top = [key for key in keys if "." not in key.path]
    options = option_keys(find_method(recipe.method).Options)
    head = takewhile(lambda line: line.startswith("#"), recipe_files()[name].read_text("utf-8").splitlines())
    body = written_out(resolve(recipe).recipe.model_dump(mode="json"), [*top, *options, *keys[len(top) :]])
    return "\n".join([*head, body])
