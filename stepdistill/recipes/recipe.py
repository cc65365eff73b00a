"""Recipes: a YAML file and ``--set a.b=c`` become frozen models in which every key is known.

An error names the place it came from, the key by its path and the nearest name that exists. Options of a method are
checked by the method's own Options class, which means importing it (and torch): ``methods.method_options``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from stepdistill.errors import UserError, did_you_mean
from stepdistill.recipes.choose import DEFAULT_TEACHER, announcement, recipe_of
from stepdistill.recipes.health_options import HealthOptions
from stepdistill.recipes.messages import explain, source_prefix
from stepdistill.recipes.section import Section
from stepdistill.recipes.sections import AgainstTeacherOptions, DataOptions, ExportOptions, StudentOptions
from stepdistill.recipes.term_options import TermOptions
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.system.parsing import Unreadable
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.shipped import method_names, recipe_files

DEFAULT_METHOD = "dmd"

WEAK = "weak"
"""What ``teachers`` calls the one that guides the recipe's own, instead of having prompts."""


class Recipe(Section):
    """Everything a run depends on.

    Attributes:
        teacher: an embedded teacher's name, a diffusers folder or a Hub name.
        family: ``./file.py`` with the family of the teacher's pipeline, where stepdistill has none for it.
        teachers: further frozen teachers of the same kind, by names of your own: a diffusers folder, a run, or a LoRA
            (its folder or .safetensors) on ``teacher``. Each is for the prompts that ``data.route`` gives it; for
            methods that learn from several, such as opd. The name ``weak`` is for a weaker version of ``teacher``,
            smaller or less trained, of all prompts: its guide in methods that take one, such as ayf. Each is one more
            network in memory.
        method: a method's name, or ``./file.py`` with one.
        options: the method's own options; ``methods.method_options`` checks them.
        terms: what is added to any method's loss.
        evaluate: False for no evaluation, True for that of the teacher: of an embedded one its suite, of any other
            ``against_teacher``; or a suite's name.
        output: run folder; None lets the command line choose one under runs/.
    """

    teacher: str = DEFAULT_TEACHER
    family: str | None = None
    teachers: dict[str, str] = Field(default_factory=dict)
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    terms: TermOptions = TermOptions()
    student: StudentOptions = StudentOptions()
    data: DataOptions = DataOptions()
    train: TrainOptions = TrainOptions()
    health: HealthOptions = HealthOptions()
    export: ExportOptions = ExportOptions()
    evaluate: bool | str = True
    against_teacher: AgainstTeacherOptions = AgainstTeacherOptions()
    output: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.student.lora_rank and self.train.weights != "float32":
            raise ValueError(
                f"train.weights is {self.train.weights}, but a LoRA trains small float32 adapters: set "
                "train.weights=float32, or student.lora_rank=0"
            )
        if (base := self.student.base) != "auto":
            _check_base(base, self.train)
        if WEAK in self.data.route:
            raise ValueError(
                f"data.route gives prompts to {WEAK}, but teachers.{WEAK} guides the teacher at all of them: take it "
                "out of data.route, or rename it in both"
            )
        if odd := sorted((self.teachers.keys() - {WEAK}) ^ self.data.route.keys()):
            lacks = (
                "data.route gives it no prompts" if odd[0] in self.teachers else "teachers has no such name"
            )
            raise ValueError(
                f"{odd[0]} is in one of teachers and data.route alone, but {lacks}: name it in both"
            )
        if "teacher" in self.teachers:
            raise ValueError(
                "teachers names one teacher, which is what the recipe's own is called: rename it"
            )
        return self

    # Key path -> where it was set: for messages only, so not part of what a recipe is or equals.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def source(self) -> str | None:
        """The shipped recipe or the file that it was read from."""
        source = self._sources.get("")
        return (
            source.removesuffix(".yaml")
            if source and source.removesuffix(".yaml") in recipe_files()
            else source
        )

    @property
    def announced(self) -> str:
        """What is said before it runs, see :func:`announcement`."""
        changed = not self._sources.keys() <= {"", "method", "teacher", "evaluate", "output"}
        return announcement(self.method, self.teacher, self.source, changed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()


def _check_base(base: str, train: TrainOptions) -> None:
    teacher = train.teacher_precision or train.precision
    if teacher != train.precision or (base == "bf16" and teacher != "bf16"):
        wanted = "both to bf16" if base == "bf16" else "both to one"
        raise ValueError(
            f"student.base is {base}, train.precision is {train.precision} and that of the teacher {teacher}, but both "
            f"are one network: set {wanted}, or student.base=auto"
        )
    if base != "bf16" and (train.parallel == "sharded" or train.compile != "none"):
        sharded = train.parallel == "sharded"
        key, value, plain = (
            ("parallel", "sharded", "replicated") if sharded else ("compile", train.compile, "none")
        )
        raise ValueError(
            f"student.base is {base} and train.{key} is {value}, which do not go together: set train.{key}={plain}, or "
            "student.base=auto"
        )


def load_recipe(
    name_or_path: str | Path | None = None,
    *,
    teacher: str | None = None,
    method: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    """Reads a recipe, then lays teacher, method and ``a.b=c`` assignments (values in YAML) over it.

    A name without .yaml is a shipped recipe. Without any name the method's recipe for the teacher is taken, the quick
    one first, and plain defaults where there is none. The method's options are not checked here.

    Args:
        name_or_path, teacher, method: what is read, and what is laid over it.
        sets: assignments, later ones over earlier ones. ``student.steps`` takes the place of the file's
            ``student.times``, and these of that.
        flags: key -> the option that set it, for messages.

    Raises:
        UserError: no such file, no valid YAML, or a key or value that a recipe cannot have.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = _find_recipe(name_or_path, teacher, method)
    if path is not None:
        sources[""] = str(path) if _is_path(name_or_path) else path.name
        tree = _read_yaml(path, sources[""])
        for key in (
            "method",
            "family",
        ):  # a file of one's own lies where the command is run, or beside the recipe
            own = tree.get(key)
            if isinstance(own, str) and own.endswith(".py"):
                tree[key] = _beside(path, own)
        for section, key in (("data", "prompts"), ("terms", "reward")):
            own = tree[section].get(key) if isinstance(tree.get(section), dict) else None
            if isinstance(own, str) and (key == "prompts" or ".py:" in own):
                file, colon, function = own.rpartition(":") if key == "reward" else (own, "", "")
                tree[section][key] = f"{_beside(path, file)}{colon}{function}"
    for key, value in (("teacher", teacher), ("method", method)):
        if value is not None:
            tree[key] = value
            sources[key] = f"--{key}"
    keys = [assignment.partition("=")[0].strip() for assignment in sets]
    _drop_replaced(tree, keys)
    for key, assignment in zip(keys, sets, strict=True):
        _assign(tree, assignment)
        sources[key] = flags.get(key, "--set")
    if not sources.get(""):
        tree.setdefault("method", DEFAULT_METHOD)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, "", "a recipe", sources)) from None
    recipe._sources.update(sources)
    _check_method(recipe, path)
    return recipe


def _beside(recipe: Path, file: str) -> str:
    """Where a file lies that a recipe names: where the command is run, or beside the recipe."""
    there = recipe.parent / file
    return str(there) if not Path(file).is_file() and there.is_file() else file


def _drop_replaced(tree: dict[str, Any], keys: Sequence[str]) -> None:
    """Takes a file's ``student.times`` out where a count of steps is set over it, and the other way round."""
    student = tree.get("student")
    for one, other in (("steps", "times"), ("times", "steps")):
        if isinstance(student, dict) and f"student.{one}" in keys and f"student.{other}" not in keys:
            student.pop(other, None)


def _is_path(name: str | Path | None) -> bool:
    return name is not None and (isinstance(name, Path) or name.endswith((".yaml", ".yml")) or "/" in name)


def _find_recipe(name: str | Path | None, teacher: str | None, method: str | None) -> Path | None:
    if name is None:
        found = recipe_of(method or DEFAULT_METHOD, teacher or DEFAULT_TEACHER, quick=True, foreign=False)
        return recipe_files()[found] if found else None
    if _is_path(name):
        if not Path(name).is_file():
            raise UserError(
                f"{name}: there is no such recipe file; `stepdistill ls recipes` lists the shipped ones"
            )
        return Path(name)
    shipped = recipe_files()
    if str(name) not in shipped:
        if name in method_names():
            raise UserError(
                f"{name} is a method, not a recipe: give --method {name}, or a name of `stepdistill ls recipes`"
            )
        near = did_you_mean(str(name), shipped, "stepdistill ls recipes")
        raise UserError(f"{name} is not a shipped recipe {near}; a file ends in .yaml")
    return shipped[str(name)]


def _read_yaml(path: Path, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except Unreadable as error:
        line = f" in line {error.line}" if error.line else ""
        raise UserError(f"{source}: not valid YAML{line}: {error}") from None
    except UnicodeDecodeError as error:
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
        value = parse_yaml(text)
    except Unreadable:
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


def _check_method(recipe: Recipe, file: Path | None) -> None:
    """The method exists; known from file names alone, so that a slip costs no import of torch."""
    source = source_prefix("method", recipe._sources)
    if recipe.method.endswith(".py"):
        if not Path(recipe.method).is_file():
            copy = (file or Path()).parent / "method.py"
            kept = f"; the run keeps a copy of it: add --set method={copy}" if copy.is_file() else ""
            raise UserError(f"{source}method is {recipe.method}, and there is no such file{kept}")
    elif recipe.method not in (known := method_names()):
        near = did_you_mean(recipe.method, known, "stepdistill ls methods")
        raise UserError(f"{source}{recipe.method} is not a method {near}")
