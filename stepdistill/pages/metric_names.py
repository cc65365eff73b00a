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
DIRECTIONS = dict.fromkeys(
    "fd second_fd kid sfid cmmd fid_infinity fd_infinity".split(), LOWER
) | dict.fromkeys(
    "clip_score second_fit precision recall density coverage inception_score pick_score aesthetic".split(),
    HIGHER,
)
"""By key of a report."""


def name_of(key: str, given: Mapping[str, str]) -> str:
    """Of a key of a report.

    Args:
        key: such as ``fd``.
        given: what the suite calls some of them.
    """
    return str(given.get(key) or _NAMES.get(key) or key.replace("_", " "))
