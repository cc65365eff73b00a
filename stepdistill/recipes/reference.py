"""Every key of a recipe, of a method's options or of any other closed model: type, default and what it means.

The meaning stands in the code once: in the Attributes of the class that declares the key, or in the comments at it.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

LINE = 100
"""Most characters of a key's one line, where its first sentence can be cut."""
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: dotted, such as ``train.updates``.
        kind: what it takes, in words: ``integer >= 1``.
        default: in YAML; empty where it must be given.
        text: what it means, the whole of it on one line; code stands between double backticks.
        own: whether the model itself declares it or gives it a default of its own, and no class that others share.
    """

    path: str
    kind: str
    default: str
    text: str
    own: bool

    @property
    def line(self) -> str:
        """The first sentence of ``text``, in at most about LINE characters, as a terminal shows it."""
        text = self.text.replace("``", "`")
        first = re.split(r"(?<!\bet al)(?<!\beq)\.(?= [A-Z0-9(]|$)", text, maxsplit=1)[0]
        if len(first) <= LINE:
            return first
        breaks = [found.start() for found in re.finditer(r"[,;:] | \(", first[:LINE])]
        return first[: breaks[-1]] if breaks else f"{first[: LINE - 3]}..."


def keys_of(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """The keys of a model, those of its sections after its own.

    Args:
        model: such as ``Recipe``, or the Options of a method.
        prefix: what stands before them in a path, ``options.``.
    """
    texts = meanings(model)
    own = {name for name in vars(model).get("__annotations__", {})}
    plain, below = [], []
    for name, field in model.model_fields.items():
        if field.exclude:
            continue  # what a model knows beside its file
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below += keys_of(field.annotation, f"{prefix}{name}.")
        else:
            kind, given = kind_of(field.annotation, field.metadata), default_of(field)
            plain.append(
                Key(f"{prefix}{name}", kind, given, _in_yaml_words(texts.get(name, "")), name in own)
            )
    return [*plain, *below]


def recipe_keys() -> list[Key]:
    """Every key of a recipe but a method's ``options``."""
    from stepdistill.recipes.recipe import Recipe

    return [key for key in keys_of(Recipe) if key.path != "options"]


def option_keys(options: type[BaseModel]) -> list[Key]:
    """Every key of a method's options, its own first and then those that it shares with others."""
    return sorted(keys_of(options, "options."), key=lambda key: not key.own)


def written_out(tree: Mapping[str, Any], keys: Sequence[Key]) -> str:
    """A recipe's YAML with every key, each with its meaning, what it takes, and its default where the value is another.

    Args:
        tree: the whole recipe, sections within it.
        keys: those of the recipe and of its method's options, top-level ones first, sections together.
    """
    lines, section = [], ""
    for key in keys:
        parent, _, name = key.path.rpartition(".")
        if parent != section:
            lines += ["", f"{parent}:"]
            section = parent
        value = in_yaml((tree[parent] if parent else tree)[name])
        other = f"; default {key.default}" if key.default and value != key.default else ""
        lines.append(f"{'  ' if parent else ''}{name}: {value}  # {key.line} ({key.kind}{other})")
    return "\n".join(lines) + "\n"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the fields of a model mean, by name: the words of the class nearest to it."""
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            texts |= {**_attributes(inspect.cleandoc(base.__doc__ or "")), **_comments(base)}
    return texts


def _in_yaml_words(text: str) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda word: words[word[1]], text)


def _attributes(doc: str) -> dict[str, str]:
    """``name: what it is`` of a docstring's Attributes, the lines below joined."""
    found: dict[str, str] = {}
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    for line in textwrap.dedent(section[1]).splitlines() if section else ():
        start = re.match(r"(\w+(?:, \w+)*): (.*)", line)
        if start:
            names, text = start[1].split(", "), start[2]
            found |= dict.fromkeys(names, text)
        elif found and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _comments(model: type[BaseModel]) -> dict[str, str]:
    """The comments at the fields of a class: on the lines above one, behind it, or inside its default."""
    source = textwrap.dedent(inspect.getsource(model))
    if "#" not in source:
        return {}
    found = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts: dict[str, str] = {}
    (body,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in body.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        while first - 1 in found and found[first - 1][1]:
            first -= 1
        if said := [found[line][0] for line in range(first, last + 1) if line in found]:
            texts[node.target.id] = " ".join(said)
    return texts


def kind_of(annotation: Any, rules: Sequence[Any] = ()) -> str:
    """A type and its bounds, in the words of someone who writes YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0], [*arguments[1:], *rules])
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(part, rules) for part in arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {kind_of(arguments[0])}s"
        return f"[{', '.join(kind_of(part) for part in arguments)}]"
    if origin in (list, dict):
        return "list" if origin is list else "section"
    return f"{_WORDS.get(annotation, 'anything')}{_bounds(rules) if annotation in (int, float) else ''}"


def _bounds(rules: Sequence[Any]) -> str:
    flat = [part for rule in rules for part in (getattr(rule, "metadata", None) or [rule])]
    said = [
        f"{sign} {getattr(rule, name):g}"
        for rule in flat
        for name, sign in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return f" {' and '.join(said)}" if said else ""


def default_of(field: FieldInfo) -> str:
    """A field's default in YAML; empty where it must be given."""
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else "{}"
    return in_yaml(field.default)


def in_yaml(value: object) -> str:
    """A plain value in YAML, on one line."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return re.sub(r"^(-?\d+)e", r"\1.0e", f"{value!r}")  # YAML 1.1 reads 1e-05 as text
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z./][\w./ @:-]*", value) and value.lower() not in _YAML_WORDS
        return value if plain and ": " not in value and not value.endswith((":", " ")) else json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(in_yaml(part) for part in value)}]"
    return json.dumps(value)


_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "null", "y", "n"})
