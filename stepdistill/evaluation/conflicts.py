"""Scores in the eyes of a network that the student's own loss has looked through: they flatter it.

A loss looks through a network where its gradient, or that of a critic over its features, came from how that network
sees the student's pictures: perceptual and reward terms, and a method's own loss by what its options say
(``networks``). That a network gives the teacher its texts, as the embedded CLIP does, is no such look.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.evaluation.suite_identity import MISSING, weights_sha256
from stepdistill.system.parsing import parse_json
from stepdistill.system.run_folder import RunFolder


def conflicts(asked: Mapping[str, str], saw: Mapping[str, str]) -> dict[str, str]:
    """The scores whose network a loss has looked through, and by which keys of the recipe.

    Args:
        asked: metrics and the specifications of their networks, as ``Suite.asked`` has them.
        saw: specifications of the networks that the loss looked through, and the keys.
    """
    keys: dict[str, str] = {}
    for spec, key in saw.items():
        keys[_identity(spec)] = ", ".join(filter(None, (keys.get(_identity(spec)), key)))
    return {metric: keys[own] for metric, spec in asked.items() if (own := _identity(spec)) in keys}


def _identity(spec: str) -> str:
    """The same for equal weights, wherever they lie."""
    try:
        sha256 = weights_sha256(spec)
    except UserError:
        return spec
    return spec if sha256 == MISSING else sha256


def loss_saw(pipeline: Any) -> dict[str, str]:
    """What the report of a run says that its loss looked through; empty of what is no run.

    Args:
        pipeline: what is evaluated: a run folder, or its student's, or anything else.
    """
    if not isinstance(pipeline, (str, Path)):
        return {}
    place = Path(pipeline)
    report = RunFolder(place.parent if place.name == "student" else place).report
    try:
        found = parse_json(report.read_text("utf-8")).get("loss_saw")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
