"""Keys of a recipe, a suite or a method's options as tables: name, default, allowed, meaning.

The meaning is what stands in the code: the class's Attributes, or the comment at the field.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstrings
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

HEAD = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]


def comments(kind: type) -> dict[str, str]:
    """The comments at the fields of a class: behind a field, inside its default, or on the lines above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    found = {
        token.start[0]: (token.string.lstrip("# "), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts: dict[str, str] = {}
    (body,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        inside = [
            found[line][0]
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if line in found
        ]
        above: list[str] = []
        line = node.lineno - 1
        while line in found and found[line][1]:
            above.insert(0, found[line][0])
            line -= 1
        if above or inside:
            texts[node.target.id] = " ".join([*above, *inside])
    return texts


def meanings(kind: type[BaseModel]) -> dict[str, str]:
    """What the fields of a model mean, the base classes' words first, then its own."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base in (object, BaseModel) or not issubclass(base, BaseModel):
            continue
        attributes = docstrings.sections(inspect.cleandoc(base.__doc__ or ""))[1].get("Attributes", "")
        texts |= docstrings.entries(attributes) | comments(base)
    return texts


def allowed(annotation: Any) -> str:
    """A type as a reader of YAML names it."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "anything"
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {allowed(arguments[0])}s"
        return f"[{', '.join(allowed(part) for part in arguments)}]"
    if get_origin(annotation) is dict:
        return "section"
    if hasattr(annotation, "__metadata__"):
        return allowed(annotation.__origin__)
    if arguments:
        return " or ".join(dict.fromkeys(allowed(part) for part in arguments))
    known = {int: "integer", float: "number", bool: "true, false", str: "text", Path: "path"}
    return known.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(field: Any) -> str:
    """Limits of a number: `>= 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [
        f"{sign} {getattr(rule, key):g}"
        for rule in field.metadata
        for key, sign in signs.items()
        if getattr(rule, key, None) is not None
    ]
    return " " + ", ".join(parts) if parts else ""


def default(field: Any) -> str:
    """A field's default in YAML."""
    value = field.default
    if value is PydanticUndefined:
        return "" if field.default_factory is None else "`{}`"
    text = (
        {None: "null", True: "true", False: "false"}.get(value)
        if value is None or isinstance(value, bool)
        else None
    )
    if text is None:
        text = (
            str(list(value))
            if isinstance(value, tuple)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
    return f"`{text}`" if text else '`""`'


def row(key: str, field: Any, text: str) -> str:
    """One row of a table."""
    kinds = f"{allowed(field.annotation)}{bounds(field)}".replace("|", "\\|")
    return f"| `{key}` | {default(field)} | {kinds} | {docstrings.cell(docstrings.plain(text))} |"


def rows(kind: type[BaseModel], prefix: str = "", only: set[str] | None = None) -> list[str]:
    """The rows of a model's fields."""
    texts = meanings(kind)
    return [
        row(f"{prefix}{name}", field, texts.get(name, ""))
        for name, field in kind.model_fields.items()
        if only is None or name in only
    ]


def tables(kind: type[BaseModel]) -> list[str]:
    """A method's options: its own in one table, those of its base classes, which others share, folded."""
    own = {name for name in kind.__annotations__ if name in kind.model_fields}
    shared = set(kind.model_fields) - own
    lines = [*HEAD, *rows(kind, "", own)] if own else []
    if shared:
        lines += [
            "",
            '??? note "Shared with other methods"',
            "",
            *(f"    {line}" for line in [*HEAD, *rows(kind, "", shared)]),
        ]
    return lines
