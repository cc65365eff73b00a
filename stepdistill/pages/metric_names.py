"""What people call a score, and which of its values are better."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = {
    "fd": "FD",
    "paired_rmse": "paired RMSE",
    "kid": "KID",
    "clip_score": "CLIP score",
    "sfid": "sFID",
    "cmmd": "CMMD",
    "pick_score": "PickScore",
    "second_fd": "FD, second features",
    "second_fit": "fit, second features",
    "fid_infinity": "FID-infinity",
    "inception_score": "Inception score",
    "inception_score_deviation": "Inception score, deviation between splits",
    "peak_memory_bytes": "peak memory",
    "network_evaluations": "denoiser passes per image",
}
LOWER, HIGHER = "lower is better", "higher is better"
DIRECTIONS = dict.fromkeys("fd second_fd kid sfid cmmd fid_infinity".split(), LOWER) | dict.fromkeys(
    "clip_score second_fit precision recall density coverage inception_score pick_score aesthetic".split(),
    HIGHER,
)
"""By key of a report."""


def name_of(key: str, given: Mapping[str, str | None]) -> str:
    """Of a key of a report.

    Args:
        key: such as ``fd``.
        given: what the suite calls some of them.
    """
    return str(given.get(key) or _NAMES.get(key) or key.replace("_", " "))


def marked(key: str, conflicts: Mapping[str, str]) -> str:
    """What stands behind a score's name, or behind the score: a mark where it is in the eyes of a network that the loss
    has looked through."""
    return "*" if key in conflicts else ""


def conflict_sentence(conflicts: Mapping[str, str], given: Mapping[str, str | None]) -> str:
    """What the mark means; empty without conflicts."""
    if not conflicts:
        return ""
    names = ", ".join(name_of(key, given) for key in conflicts)
    keys = ", ".join(dict.fromkeys(conflicts.values()))
    return f"* The training's own loss looked through the network of these scores ({keys}), and flatters them: {names}."
