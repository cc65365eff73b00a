"""The reference, read from the code: commands, recipe keys, suite keys, Python, error messages."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import docstrings
import options
import typer
from pydantic import BaseModel

import stepdistill
from stepdistill.cli import app
from stepdistill.evaluation.suite import Suite
from stepdistill.recipes.recipe import Recipe

PACKAGE = Path(stepdistill.__file__).parent
PYTHON = {
    "stepdistill.distill": "stepdistill.training.distil:distill",
    "stepdistill.evaluate": "stepdistill.evaluation.evaluate:evaluate",
    "stepdistill.load_recipe": "stepdistill.recipes.recipe:load_recipe",
    "stepdistill.evaluation.given_images.evaluate_images": "stepdistill.evaluation.given_images:evaluate_images",
    "stepdistill.evaluation.given_images.score_images": "stepdistill.evaluation.given_images:score_images",
    "stepdistill.training.distil.Distilled": "stepdistill.training.distil:Distilled",
    "stepdistill.training.run_report.RunReport": "stepdistill.training.run_report:RunReport",
}
"""The functions and classes of the page on Python: name -> module:attribute."""


def pages() -> dict[str, str]:
    """All pages of this module."""
    return {
        "reference/commands.md": commands(),
        "reference/recipe.md": recipe(),
        "reference/suite.md": suite(),
        "reference/python.md": python(),
        "reference/messages.md": messages(),
    }


def commands() -> str:
    """The command line, verb by verb."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "`stepdistill VERB --help` says the same. A mistake of yours is one line on stderr and exit status 2.",
        "",
    ]
    for name, verb in group.commands.items():
        arguments = [p for p in verb.params if p.param_type_name == "argument"]
        asked = " ".join(
            (p.metavar or p.name.upper()) if p.required else f"[{p.metavar or p.name.upper()}]"
            for p in arguments
        )
        lines += [
            f"## {name}",
            "",
            f"`stepdistill {name} {asked}`".replace(" `", "`"),
            "",
            docstrings.usage(verb.help or ""),
        ]
        lines += ["| | default | |", "| --- | --- | --- |"]
        for parameter in verb.params:
            if parameter.name == "help":
                continue
            shown = (
                ", ".join(f"`{flag}`" for flag in parameter.opts)
                if parameter.param_type_name == "option"
                else f"`{parameter.name.upper()}`"
            )
            default = (
                ""
                if parameter.default in (None, False, ()) or callable(parameter.default)
                else f"`{parameter.default}`"
            )
            lines.append(
                f"| {shown} | {default} | {docstrings.cell(docstrings.plain(parameter.help or ''))} |"
            )
        lines.append("")
    return "\n".join(lines)


def recipe() -> str:
    """Every key of a recipe."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is a YAML file. Every key can be set on the command line, `--set train.updates=500`. An unknown key "
        "or a wrong value is refused at once, with the nearest right one. Times are in [0, 1]: 0 is data, 1 is noise.",
        "",
        "Recipes to start from: `stepdistill ls recipes`, then `stepdistill cp NAME my.yaml`.",
        "",
    ]
    sections = {
        name: field.annotation for name, field in Recipe.model_fields.items() if _is_section(field.annotation)
    }
    lines += [
        "## Top",
        "",
        *options.HEAD,
        *options.rows(Recipe, "", set(Recipe.model_fields) - set(sections)),
        "",
    ]
    lines += ["Keys of `options` belong to the method: see [its page](../methods/index.md).", ""]
    for name, kind in sections.items():
        intro = docstrings.sections(inspect.cleandoc(kind.__doc__ or ""))[0]
        lines += [
            f"## {name}",
            "",
            docstrings.paragraphs(intro),
            *options.HEAD,
            *options.rows(kind, f"{name}."),
            "",
        ]
    return "\n".join(lines)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def suite() -> str:
    """Every key of a suite."""
    return "\n".join(
        [
            "# Suite keys",
            "",
            "A suite is a YAML file that fixes a protocol of evaluation. A short one to start from: "
            "[Your own suite](../measure/own_suite.md). A key without a default must be given.",
            "",
            *options.HEAD,
            *options.rows(Suite),
            "",
        ]
    )


def python() -> str:
    """The public functions, from their docstrings."""
    lines = [
        "# Python",
        "",
        "`import stepdistill` is fast; torch is imported by the first call. For methods and families of your own "
        "everything comes from `stepdistill.extend`: [Your own method](../extend/own_method.md).",
        "",
    ]
    for name, place in PYTHON.items():
        module, _, attribute = place.partition(":")
        lines.append(docstrings.function(name, getattr(importlib.import_module(module), attribute)))
    return "\n".join(lines)


def messages() -> str:
    """Every message of a UserError, by package, with what is filled in in brackets."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0]
        if room in ("_content", "teacher_training"):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            if getattr(node.exc.func, "id", "") == "UserError" and (text := template(node.exc.args[0])):
                found.setdefault(room.removesuffix(".py"), []).append(text)
    lines = [
        "# Error messages",
        "",
        "What the toolkit says when something is wrong that you can mend. `…` stands for what is filled in. "
        "Causes and cures of the frequent ones: [When it goes wrong](../guides/trouble.md).",
        "",
    ]
    for room, texts in found.items():
        lines += [f"## {room}", "", *(f"- {docstrings.plain(text)}" for text in dict.fromkeys(texts)), ""]
    return "\n".join(lines)


def template(node: ast.expr) -> str:
    """The text of a string or an f-string, … where a value is filled in; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""
