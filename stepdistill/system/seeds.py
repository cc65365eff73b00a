"""The seeds of pictures."""

from __future__ import annotations

LARGEST_SEED = 2**62
"""Of a first picture: torch's generators take less than 2^64, and the pictures after it have larger ones."""
