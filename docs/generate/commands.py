"""The commands of the documents: every `sh` block, what stands before it in words, and whether the tool takes it.

    python docs/generate/commands.py FOLDER     runs what takes seconds, beside a finished run in FOLDER/runs/dmd_emoji

A block without a mark is run by the tests. Else the line before it says in italics why not, in a form of MARK.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repository_pages
import typer

from stepdistill.cli import app
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import method_names, recipe_files, suite_files

ROOT = Path(__file__).resolve().parents[2]
RUN_LATER = ("Needs a finished run", "Takes seconds")
"""Marks of blocks that .ci/run runs."""
READ_ONLY = ("Needs a GPU", "Needs the network", "Needs your own files", r"Takes (?:\d+ )?(?:minutes|hours)")
"""Marks of blocks whose commands are checked, but not run."""
MARK = re.compile(rf"^\*({'|'.join((*RUN_LATER, *READ_ONLY))})[^*]*\*$")
RUN_AT_ONCE = ("ls", "cp", "--version", "--help")
"""Verbs of blocks without a mark, which the tests run."""
READ = ("README.md", "CONTRIBUTING.md", "train/README.md", "eval/README.md")


@dataclass(frozen=True)
class Block:
    """One `sh` block: where it stands, its mark ("" for none), and its commands of stepdistill as words."""

    place: str
    mark: str
    commands: tuple[tuple[str, ...], ...]


def documents() -> list[Path]:
    """The pages whose commands are looked at."""
    return [*(ROOT / name for name in READ), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(file: Path, root: Path = ROOT) -> Iterator[Block]:
    """The `sh` blocks of a page that call stepdistill."""
    before, inside, start = "", None, 0
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        text = line.strip()
        if inside is None:
            if text.startswith("```sh"):
                inside, start = [], number
            elif text and not text.startswith("<!--"):
                before = text
        elif text.startswith("```"):
            mark = MARK.match(before)
            found = tuple(commands("\n".join(inside)))
            if found:
                yield Block(f"{file.relative_to(root)}:{start}", mark[1] if mark else "", found)
            before, inside = "", None
        else:
            inside.append(line)


def inline(file: Path) -> Iterator[tuple[str, ...]]:
    """The commands that stand in a page's sentences and tables, which are checked, too."""
    prose = "".join(line for plain, line in repository_pages.outside_fences(file.read_text("utf-8")) if plain)
    for found in re.finditer(r"`(stepdistill [^`]*)`", prose):
        if "..." not in found[1]:
            yield from commands(" ".join(found[1].split()))


def commands(text: str) -> Iterator[tuple[str, ...]]:
    """The words behind `stepdistill` of every call in a block, however it is launched."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "stepdistill" in words and (words[0] == "stepdistill" or "-m" in words):
                yield tuple(words[words.index("stepdistill") + 1 :])


@functools.cache
def verbs() -> Any:
    """The tool's command line."""
    return typer.main.get_command(app)


@functools.cache
def check(command: tuple[str, ...]) -> None:
    """Whether the tool takes a command: its verb, its options, and the names and keys in it.

    Raises:
        ValueError: no such recipe, method or suite.
        typer's UsageError: no such option, or a value that it does not take.
        UserError: no such key of a recipe.
    """
    group = verbs()
    if command[0].startswith("--"):
        group.make_context("stepdistill", list(command), resilient_parsing=True)
        return
    verb = group.commands[command[0]]
    given = verb.make_context(command[0], list(command[1:])).params
    known = {"method": method_names(), "suite": suite_files(), "recipe": recipe_files()}
    for key, names in known.items():
        name = given.get(key)
        if isinstance(name, str) and not (name in names or name.isupper() or name.endswith((".yaml", ".py"))):
            raise ValueError(f"{' '.join(command)}: {name} is no {key}")
    recipe = given.get("recipe")
    if given.get("sets") and not str(recipe).isupper() and not str(recipe).startswith("my"):
        shipped = recipe if recipe in known["recipe"] or Path(str(recipe)).is_file() else None
        method = given.get("method") if given.get("method") in known["method"] else None
        load_recipe(shipped, method=method, sets=given["sets"])


def run(folder: Path) -> None:
    """Runs every block of which .ci/run is to run the commands.

    Raises:
        SystemExit: one fails.
    """
    for file in documents():
        for block in blocks(file):
            if block.mark not in RUN_LATER:
                continue
            for command in block.commands:
                print(f"{block.place}: stepdistill {shlex.join(command)}", flush=True)
                done = subprocess.run(
                    [sys.executable, "-m", "stepdistill", *command], cwd=folder, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{block.place}: exit status {done.returncode}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
