"""Docstrings as Markdown: paragraphs, lists, and the sections Args, Attributes, Returns, Raises."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

SECTIONS = ("Args", "Attributes", "Class attributes", "Returns", "Yields", "Raises")
ARXIV = re.compile(r"(?<![\d/.])(\d{4}\.\d{5})(?!\d|\.\d)")


def plain(text: str) -> str:
    """Text of a docstring as Markdown: code stays code, nothing else is markup, papers are links."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    return "".join(_code(part) if i % 2 else _prose(part) for i, part in enumerate(parts))


def _code(text: str) -> str:
    return f"`{' '.join(text.strip('`').split())}`"


def _prose(text: str) -> str:
    escaped = re.sub(r"([\\*_\[\]|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", escaped)


def cell(text: str) -> str:
    """One line for a table's cell."""
    return " ".join(text.split())


def paragraphs(text: str) -> str:
    """The body of a docstring: paragraphs and lists as they are written."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        items = re.split(r"\n(?=- )", block)
        blocks.append(
            "\n".join(
                re.sub(r"\n\s*", "\n    " if item.startswith("- ") else "\n", plain(item)) for item in items
            )
        )
    return "\n\n".join(blocks) + "\n"


def usage(text: str) -> str:
    """The help of a verb: its examples, which begin with the command's name, as code."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return (
        "\n\n".join(
            f"    {' '.join(b.split())}" if b.startswith("stepdistill ") else plain(b) for b in blocks
        )
        + "\n"
    )


def sections(text: str) -> tuple[str, dict[str, str]]:
    """The body of a docstring, and its sections by name, dedented."""
    lines = inspect.cleandoc(text).splitlines()
    body: list[str] = []
    found: dict[str, list[str]] = {}
    into = body
    for line in lines:
        name = line.rstrip().removesuffix(":")
        if line.rstrip().endswith(":") and name in SECTIONS:
            into = found.setdefault(name, [])
        elif into is not body and line and not line.startswith(" "):
            into = body
            into.append(line)
        else:
            into.append(line)
    return "\n".join(body).strip(), {
        name: inspect.cleandoc("\n" + "\n".join(part)) for name, part in found.items()
    }


def entries(section: str) -> dict[str, str]:
    """``name: what it is`` of a section, the lines below joined; ``a, b: ...`` says the same of both."""
    found: dict[str, str] = {}
    for line in section.splitlines():
        start = re.match(r"([\w., *]+?): (.*)", line)
        if start and not line.startswith(" "):
            found[start[1]] = start[2]
        elif found and line.strip():
            last = next(reversed(found))
            found[last] += " " + line.strip()
    return {name.strip(): text for names, text in found.items() for name in names.split(",")}


def signature(name: str, what: Callable[..., Any]) -> str:
    """How it is called, one argument a line where they are many."""
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(what)))
    if len(name) + len(text) <= 88:
        return name + text
    inside, _, gives = text.removeprefix("(").rpartition(")")
    arguments = re.sub(r", (?=(?:\*|\w+)(?:[:=,]|$))", ",\n    ", inside)
    return f"{name}(\n    {arguments},\n){gives}"


def function(name: str, what: Callable[..., Any]) -> str:
    """A function or a class of the public interface as a section of a page."""
    body, parts = sections(inspect.getdoc(what) or "")
    lines = [f"## {name}", "", paragraphs(body)]
    if isinstance(what, type):  # a record: what it has, that of the classes below it first
        bases = [
            sections(base.__doc__ or "")[1].get("Attributes", "")
            for base in reversed(what.__mro__)
            if base.__module__.startswith("stepdistill")
        ]
        parts = {"Attributes": "\n".join(bases)}
    else:
        lines[2:2] = ["```python", signature(name, what), "```", ""]
    for section, text in parts.items():
        lines += [f"**{section}**", ""]
        listed = entries(text) if section != "Returns" else {}
        lines += [f"- `{key}`: {plain(value)}" for key, value in listed.items()] or [plain(cell(text))]
        lines.append("")
    return "\n".join(lines)
