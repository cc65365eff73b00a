"""How many rows of a matrix are held at a time, so that its memory does not grow with the number of images."""

from __future__ import annotations

CELLS = 1 << 20
"""Numbers of a block: 8 MiB in float64."""


def rows_at_once(columns: int, most: int) -> int:
    """Rows of a block of so many columns: at most ``most``, at least 1."""
    return max(1, min(most, CELLS // max(1, columns)))
