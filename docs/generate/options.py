"""Keys of a recipe, a suite or a method's options as tables: name, default, what it takes, meaning."""

from __future__ import annotations

import docstrings
from pydantic import BaseModel

from stepdistill.recipes.reference import Key, keys_of

HEAD = ["| key | default | takes | meaning |", "| --- | --- | --- | --- |"]


def row(key: Key) -> str:
    """One row of a table."""
    given = f"`{key.default}`" if key.default else ""
    return f"| `{key.path}` | {given} | {key.kind} | {docstrings.cell(docstrings.plain(key.text))} |"


def rows(kind: type[BaseModel], prefix: str = "", only: set[str] | None = None) -> list[str]:
    """The rows of a model's fields."""
    wanted = None if only is None else {f"{prefix}{name}" for name in only}
    return [row(key) for key in keys_of(kind, prefix) if wanted is None or key.path in wanted]


def tables(kind: type[BaseModel]) -> list[str]:
    """A method's options: its own in one table, those of its base classes, which others share, folded."""
    keys = keys_of(kind)
    own, shared = ([row(key) for key in keys if key.own is whose] for whose in (True, False))
    lines = [*HEAD, *own] if own else []
    if shared:
        folded = [f"    {line}" for line in [*HEAD, *shared]]
        lines += ["", '??? note "Shared with other methods"', "", *folded]
    return lines
