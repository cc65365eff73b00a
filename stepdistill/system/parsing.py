"""JSON of files that anyone may have made: what cannot be read is one kind of error. Imports neither torch nor yaml."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

LARGEST = 1 << 53
"""Of whole numbers in a file: above it one and the next are the same in float64."""

DEEPEST = 64
"""Levels of nesting. The deepest of our own files has five."""


class Unreadable(ValueError):
    """Why a text is not what it should be, in one line.

    Attributes:
        line: where, from 1; None where that is not known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.line = line


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        Unreadable: it is not UTF-8, not JSON, nested too deep, or has a number of thousands of digits.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise Unreadable(f"nested deeper than {DEEPEST}") from None
    except ValueError as error:
        raise Unreadable(str(error)) from None
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return found
    raise Unreadable(f"nested deeper than {DEEPEST}")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def printable(text: str) -> str:
    """A text of a file as a terminal may have it: in one line, and without characters that move its cursor, change its
    colours or are no characters."""
    return "".join(each if each.isprintable() else " " for each in text)
