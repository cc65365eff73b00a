"""Recipes: a YAML file and ``--set a.b=c`` become frozen models in which every key is known.

An error names the place it came from, the key by its path and the nearest name that exists. Options of a method are
checked by the method's own Options class, which means importing it (and torch): :func:`method_options`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
)

from stepdistill.content import module_summaries, recipe_files
from stepdistill.errors import UserError, did_you_mean
from stepdistill.sections import DataOptions, Section, StudentOptions, TermOptions, TrainOptions

if TYPE_CHECKING:
    from stepdistill.types import MethodOptions

DEFAULT_TEACHER = "emoji"
DEFAULT_METHOD = "dmd"


class Recipe(Section):
    """Everything a run depends on.

    Attributes:
        teacher: an embedded teacher's name, a diffusers folder or a Hub name.
        method: a method's name, or ``./file.py`` with one.
        options: the method's own options; :func:`method_options` checks them.
        terms: what is added to any method's loss.
        evaluate: False for no evaluation, True for the teacher's own suite, or a suite's name.
        output: run folder; None lets the command line choose one under runs/.
    """

    teacher: str = DEFAULT_TEACHER
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    terms: TermOptions = TermOptions()
    student: StudentOptions = StudentOptions()
    data: DataOptions = DataOptions()
    train: TrainOptions = TrainOptions()
    evaluate: bool | str = True
    output: str | None = None

    # Key path -> where it was set: for messages only, so not part of what a recipe is or equals.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()


def load_recipe(
    name_or_path: str | Path | None = None,
    *,
    teacher: str | None = None,
    method: str | None = None,
    sets: Sequence[str] = (),
) -> Recipe:
    """Reads a recipe, then lays teacher, method and ``a.b=c`` assignments (values in YAML) over it.

    A name without .yaml is a shipped recipe. Without any name the method's recipe for an embedded teacher is taken,
    the quick one first, and plain defaults where there is none. The method's options are not checked here.

    Raises:
        UserError: no such file, no valid YAML, or a key or value that a recipe cannot have.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = _find_recipe(name_or_path, teacher, method)
    if path is not None:
        sources[""] = str(path) if _is_path(name_or_path) else path.name
        tree = _read_yaml(path, sources[""])
        own = tree.get("method")
        if isinstance(own, str) and own.endswith(".py") and not Path(own).is_file():
            beside = (
                path.parent / own
            )  # a method's file may lie where the command is run, or beside its recipe
            tree["method"] = str(beside) if beside.is_file() else own
    for key, value in (("teacher", teacher), ("method", method)):
        if value is not None:
            tree[key] = value
            sources[key] = f"--{key}"
    for assignment in sets:
        _assign(tree, assignment)
        sources[assignment.partition("=")[0].strip()] = "--set"
    if not sources.get(""):
        tree.setdefault("method", DEFAULT_METHOD)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, Recipe, "", "a recipe", sources)) from None
    recipe._sources.update(sources)
    _check_method(recipe)
    return recipe


def method_options(recipe: Recipe) -> MethodOptions:
    """The recipe's options in the method's own Options class. Imports the method, and torch with it.

    Raises:
        UserError: an option the method does not have, or a value it cannot take.
    """
    from stepdistill.methods import find_method

    schema = find_method(recipe.method).Options
    try:
        return schema.model_validate(recipe.options)
    except ValidationError as error:
        name = Path(recipe.method).stem
        raise UserError(_explain(error, schema, "options", name, recipe._sources)) from None


def resolved(recipe: Recipe) -> Recipe:
    """The same recipe with every option of its method written out."""
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


def _is_path(name: str | Path | None) -> bool:
    return name is not None and (isinstance(name, Path) or name.endswith((".yaml", ".yml")) or "/" in name)


def _find_recipe(name: str | Path | None, teacher: str | None, method: str | None) -> Path | None:
    if name is None:
        shipped, own = recipe_files(), f"{method or DEFAULT_METHOD}_{teacher or DEFAULT_TEACHER}"
        return shipped.get(f"{own}_quick", shipped.get(own))
    if _is_path(name):
        if not Path(name).is_file():
            raise UserError(
                f"{name}: there is no such recipe file; `stepdistill ls recipes` lists the shipped ones"
            )
        return Path(name)
    shipped = recipe_files()
    if str(name) not in shipped:
        raise UserError(
            f"{name} is not a shipped recipe {did_you_mean(str(name), shipped)}; a file ends in .yaml"
        )
    return shipped[str(name)]


def _read_yaml(path: Path, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}: not valid YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not YAML text: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{source}: a recipe is a mapping of keys to values, and this file is not")
    return tree


def _assign(tree: dict[str, Any], assignment: str) -> None:
    """Sets a.b = c in the tree; the value is YAML."""
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {assignment}: write it as key=value, such as --set train.lr=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"--set {assignment}: {text} is not a YAML value; quote it, such as '{key}=\"...\"'"
        ) from None
    for depth, part in enumerate(parts[:-1]):
        below = tree.setdefault(part, {})
        if below is None:
            below = tree[part] = {}
        if not isinstance(below, dict):
            raise UserError(f"--set {assignment}: {'.'.join(parts[: depth + 1])} is a value, not a section")
        tree = below
    tree[parts[-1]] = value


def _check_method(recipe: Recipe) -> None:
    """The method exists; known from file names alone, so that a slip costs no import of torch."""
    source = _prefix("method", recipe._sources)
    if recipe.method.endswith(".py"):
        if not Path(recipe.method).is_file():
            raise UserError(f"{source}method is {recipe.method}, and there is no such file")
    elif recipe.method not in (known := module_summaries("methods")):
        raise UserError(f"{source}{recipe.method} is not a method {did_you_mean(recipe.method, known)}")


def _prefix(path: str, sources: Mapping[str, str]) -> str:
    """``source: `` of the innermost key at or above ``path`` whose origin is known."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        if source := sources.get(".".join(parts[:depth])):
            return f"{source}: "
    return ""


def _explain(
    error: ValidationError, model: type[BaseModel], prefix: str, owner: str, sources: Mapping[str, str]
) -> str:
    """One line for all that is wrong: source, key path, what was found and what is allowed."""
    found: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        path, section = _locate(problem["loc"], model, prefix)
        if problem["type"] == "extra_forbidden":
            text = _unknown(path, section, model, prefix, owner)
        elif problem["type"] == "missing":
            text = f"{path} is missing"
        elif problem["type"] == "value_error":
            text = f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"])
        elif problem["type"] in ("model_type", "dict_type"):
            text = f"{path} is {problem['input']!r} and should be a section of keys"
        else:
            text = f"{path} is {problem['input']!r} and {_lower(problem['msg'])}"
        # The members of a union report one after the other under one path.
        texts = found.setdefault(path, [])
        texts.append(_lower(problem["msg"]).removeprefix("should be ") if texts else text)
    return "; ".join(f"{_prefix(path, sources)}{' or '.join(texts)}" for path, texts in found.items())


def _lower(message: str) -> str:
    text = message.replace("Input should", "should")
    return text[:1].lower() + text[1:]


def _locate(loc: Sequence[int | str], model: type[BaseModel], prefix: str) -> tuple[str, type[BaseModel]]:
    """The dotted key path of an error, without pydantic's names of union members, and the model it lies in."""
    path, section = prefix, model
    for depth, part in enumerate(loc):
        path = f"{path}.{part}" if path else str(part)
        field = section.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            # What follows is an index into a tuple, or the name of a union's member.
            return path + "".join(f"[{i}]" for i in loc[depth + 1 :] if isinstance(i, int)), section
        section = inner
    return path, section


def _unknown(path: str, section: type[BaseModel], model: type[BaseModel], prefix: str, owner: str) -> str:
    names = list(section.model_fields)
    parent, _, key = path.rpartition(".")
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? It" if near else "it"
    kind = "an option" if prefix else "a key"
    where = owner if section is model else parent
    return f"{path} is not {kind} of {where} ({hint} has: {', '.join(names) or 'none'})"
