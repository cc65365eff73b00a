"""JSON of files that anyone may have made: what cannot be read is one kind of error. Imports neither torch nor yaml."""

from __future__ import annotations

import json
from typing import Any

LARGEST = 1 << 53
"""Of whole numbers in a file: above it one and the next are the same in float64."""


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
        return json.loads(text)
    except RecursionError:
        raise Unreadable("nested too deep") from None
    except ValueError as error:
        raise Unreadable(str(error)) from None


def printable(text: str) -> str:
    """A text of a file as a terminal may have it: in one line, and without characters that move its cursor, change its
    colours or are no characters."""
    return "".join(each if each.isprintable() else " " for each in text)
