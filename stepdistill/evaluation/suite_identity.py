"""Whether two scores compare: what a report states of its suite, and the suite's hash, files and weights included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stepdistill.errors import MissingWeights
from stepdistill.evaluation.suite import Suite
from stepdistill.features.load import features_sha256
from stepdistill.features.network import FeatureNetwork
from stepdistill.system.files import sha256_of

MISSING = "missing"
"""Stands for the SHA-256 of weights that are not here, in hashes and protocols."""


OWN_METRIC = "metric_"
"""Begins the keys of a protocol that hold the SHA-256 of the file of your own metric."""
FILE_KEYS = frozenset({"prompts", "reference", "cmmd_reference", "aesthetic"})
"""Keys of a Suite that name files."""


APART = {
    *(
        "images",
        "source",
        "teacher_steps",
        "diversity",
        "diversity_prompts",
        "intervals",
        "metrics",
        "adds_to",
    ),
    *("second_features", "second_reference"),
}
"""Keys of a Suite that move no score, or none but their own."""


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


def protocol_of(suite: Suite, network: FeatureNetwork | None) -> dict[str, str]:
    """What a report states of the suite, besides its numbers: two scores compare only where all of it is equal.

    Args:
        network: the suite's; None where its weights are missing.
    """
    networks = {} if not suite.clip_prefix else {"clip_prefix": suite.clip_prefix}
    for key, spec in suite.networks().items():
        networks |= {key: without_folder(spec), f"{key}_sha256": weights_sha256(spec)}
    return {
        "resize": network.resize if network else suite.resize,
        "features": without_folder(network.name if network else suite.features),
        "precision": suite.precision,
        "features_sha256": network.sha256 if network else MISSING,
        "reference_sha256": sha256_of(suite.reference_file()),
        "suite_sha256": suite_sha256(suite),
        "neighbours": str(suite.neighbours),
        **networks,
        **_further_files(suite),
        **second_of(suite),
        **{f"{OWN_METRIC}{metric.name}_sha256": metric.sha256 for metric in suite.own_metrics()},
    }


def suite_sha256(suite: Suite) -> str:
    """Of everything that moves a score: the protocol (keys at their defaults left out, so that a new key does not
    change old suites), the prompts, the networks' weights and the reference files. What only adds a score of its
    own, diversity, your own metrics and the second features, is not part of it, and neither are intervals. A version
    that only adds scores has the hash of the one that it adds to."""
    protocol = suite.model_dump(mode="json", exclude_defaults=True, exclude=APART)
    if suite.adds_to is not None:
        protocol["version"] = suite.adds_to
    for key in protocol.keys() & FILE_KEYS:  # their content counts, wherever they lie
        protocol[key] = Path(protocol[key]).name
    for key in protocol.keys() & {"features", *suite.networks()}:
        kind = protocol[key].partition(":")[0]
        protocol[key] = protocol[key] if kind == "module" else kind
    content: dict[str, Any] = {
        "suite": protocol,
        "prompts": suite.prompt_list(),
        "features": weights_sha256(suite.features),
        "reference": sha256_of(suite.reference_file()),
    }
    if suite.inception_score:
        content["inception_score"] = (
            "logits without bias"  # of images that were measured with it, scores are others
        )
    if networks := suite.networks():
        content |= {"networks": {key: weights_sha256(spec) for key, spec in networks.items()}}
        content |= {"files": _further_files(suite)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def second_of(suite: Suite) -> dict[str, str]:
    """What the scores in the second features depend on besides the rest; empty of a suite without."""
    file = suite.second_reference_file()
    if suite.second_features is None or file is None:
        return {}
    return {
        "second_features": without_folder(suite.second_features),
        "second_features_sha256": weights_sha256(suite.second_features),
        "second_reference_sha256": sha256_of(file),
    }


def _further_files(suite: Suite) -> dict[str, str]:
    """The SHA-256 of the files besides networks and reference."""
    found = {}
    if (file := suite.cmmd_reference_file()) is not None:
        found["cmmd_reference_sha256"] = sha256_of(file)
    if suite.aesthetic is not None:
        head = suite.aesthetic_file()
        found["aesthetic_sha256"] = sha256_of(head) if head.is_file() else MISSING
    return found
