"""What a suite's numbers depend on besides its keys: the files that they name, and the weights of its networks."""

from __future__ import annotations

from pathlib import Path

from stepdistill.errors import MissingWeights
from stepdistill.features.load import features_sha256

MISSING = "missing"
"""Stands for the SHA-256 of weights that are not here, in hashes and protocols."""


FILE_KEYS = frozenset({"prompts", "reference", "cmmd_reference", "aesthetic"})
"""Keys of a Suite that name files."""


def weights_sha256(spec: str) -> str:
    """The SHA-256 of a network's weights, or MISSING."""
    try:
        return features_sha256(spec)
    except MissingWeights:
        return MISSING


def without_folder(spec: str) -> str:
    """A specification that names a path, with its last part: the same weights compare wherever they lie."""
    kind, _, location = spec.partition(":")
    here = kind != "module" and location and Path(location).expanduser().exists()
    return f"{kind}:{Path(location).name}" if here else spec
