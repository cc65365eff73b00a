"""Names of rewards in a recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REWARDS = {
    "clip": "clip:emoji (the embedded network) or clip:FOLDER, also PickScore's",
    "judge": "judge (the second embedded network)",
    "colour": "colour (the hue that a caption names)",
    "ink": "ink, or ink:SHARE towards a share of the picture",
    "module": "module:PACKAGE.MODULE:FUNCTION",
    "file": "./FILE.py:FUNCTION (one's own)",
}
"""What there is, by kind."""


@dataclass(frozen=True)
class OwnReward:
    """A function of the user's, in a file."""

    file: Path
    function: str


def own_reward(name: str) -> OwnReward | None:
    """The file and function of ``./FILE.py:FUNCTION``; None for any other name."""
    file, colon, function = name.rpartition(":")
    return OwnReward(Path(file), function) if colon and file.endswith(".py") else None


def reward_kind(name: str) -> str:
    """The kind of a reward, by REWARDS.

    Raises:
        ValueError: there is none of this name.
    """
    if own_reward(name):
        return "file"
    if name == "emoji":
        raise ValueError("the reward emoji is called clip:emoji")
    kind, colon, rest = name.partition(":")
    if kind in ("judge", "colour") and colon:
        raise ValueError(f"{kind} takes nothing behind a colon; found {name}")
    if kind == "ink" and colon:
        try:
            fine = 0 <= float(rest) <= 1
        except ValueError:
            fine = False
        if not fine:
            raise ValueError(f"ink takes a share in [0, 1], such as ink:0.4; found {name}")
    if kind not in REWARDS or kind == "file" or (kind in ("clip", "module") and not rest):
        raise ValueError(f"the reward {name!r} is not known: give {', '.join(REWARDS.values())}")
    return kind
