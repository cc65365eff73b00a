"""Where the files that are not Python modules of the package lie, in a wheel as in a checkout.

train/, eval/ and pipelines/ are folders at the top of the repository; the wheel carries them as stepdistill._content.
Nothing here imports torch: ``stepdistill ls`` answers at once.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Literal

from stepdistill.errors import UserError, did_you_mean

Folder = Literal["train", "eval", "pipelines"]

LFS = b"version https://git-lfs"
"""What a Git LFS pointer begins with."""
_PACKAGE = Path(__file__).resolve().parents[1]


def content_folder(name: Folder) -> Path:
    """The folder train/, eval/ or pipelines/: from the wheel, or from the checkout in an editable installation.

    Raises:
        FileNotFoundError: neither is there, so the installation is damaged.
    """
    for folder in (_PACKAGE / "_content" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"stepdistill's content folder {name}/ is missing beside {_PACKAGE}: reinstall it"
    )


def cache_folder() -> Path:
    """The user's cache: $STEPDISTILL_CACHE, else stepdistill in $XDG_CACHE_HOME, which is ~/.cache where it is not
    set."""
    if given := os.environ.get("STEPDISTILL_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stepdistill"


def recipe_files() -> dict[str, Path]:
    """Shipped recipes by name (the file's name without .yaml)."""
    return {path.stem: path for path in sorted((content_folder("train") / "recipes").glob("*.yaml"))}


def template_files() -> dict[str, Path]:
    """Shipped Python files to start from, by what they are a template of."""
    return {"own_method": content_folder("train") / "examples" / "method_template.py"}


def suite_files() -> dict[str, Path]:
    """Shipped evaluation suites by name."""
    return {path.stem: path for path in sorted((content_folder("eval") / "suites").glob("*.yaml"))}


def suite_file(name: str | Path) -> Path:
    """The file of a suite: of a shipped name, or the path of a YAML file.

    Raises:
        UserError: there is no such suite.
    """
    shipped = suite_files()
    file = shipped.get(str(name), Path(name).expanduser())
    if file.suffix not in (".yaml", ".yml"):
        near = did_you_mean(str(name), shipped, "stepdistill ls suites")
        raise UserError(f"no suite {str(name)!r} {near}; or give a YAML file")
    if not file.is_file():
        raise UserError(f"no suite file {file}; give a YAML file as in eval/suites, or the name of one")
    return file


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves in the place of one that Git LFS keeps, until it is pulled."""
    with file.open("rb") as stream:
        return stream.read(len(LFS)) == LFS


def method_names() -> list[str]:
    """Names of the methods that come with the package, read without importing any."""
    return sorted(path.stem for path in (_PACKAGE / "methods").glob("[!_]*.py"))


def module_summaries(package: Literal["methods", "families"]) -> dict[str, str]:
    """What a subpackage offers, with the first line of each docstring, read without importing anything."""
    found: dict[str, str] = {}
    for path in sorted((_PACKAGE / package).glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if package == "methods" or "\n    pipelines = " in source:  # a family, and not what families share
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def of_real_teacher(recipe: Path) -> bool:
    """Whether a recipe is for a teacher of the Hub, rather than for an embedded one."""
    named = (line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("teacher:"))
    return "/" in next(named, "")


def header(path: Path) -> str:
    """The comment a YAML file opens with, up to an empty line of it, on one line: its command, its needs and what it
    gave."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line == "#":
            break
        text = line.lstrip("# ").rstrip()
        if len(lines) > 1 and not lines[-1].endswith("."):  # a sentence goes on
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return " | ".join(line for line in lines if line)
