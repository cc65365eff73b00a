"""Reference statistics: moments of the real images' features, read in the formats of the field and made by our own.

    safetensors  ours: mean, covariance, perhaps features, and the protocol that made them in the header
    npz          clean-fid, pytorch-fid, EDM: mu, sigma; ADM: also mu_s, sigma_s (of sFID) and arr_0, the images
    pkl          EDM2: {"fid": {"mu", "sigma"}, "fd_dinov2": {...}}, read without running anything

A distance to statistics of another network, resize or resolution is a number without a meaning. Ours say what made
them; for the others the suite must say it (``reference_protocol``). What differs, or is not known, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.data.image_archives import open_images
from stepdistill.data.image_sources import ImageSource
from stepdistill.errors import MissingWeights, UserError
from stepdistill.evaluation.reference_files import Reference, read_reference
from stepdistill.features.load import features_sha256
from stepdistill.features.network import FeatureNetwork, Precision
from stepdistill.metrics.frechet import Moments
from stepdistill.system.files import sha256_of
from stepdistill.system.log import bar
from stepdistill.system.prefetch import ahead

if TYPE_CHECKING:
    from stepdistill.evaluation.suite import Suite


STATED = ("features", "resize", "resolution")
"""What must be known of a reference: its network, its resize mode and the resolution of its images."""


def load_reference(suite: Suite, network: FeatureNetwork | None, *, progress: bool = False) -> Reference:
    """The suite's reference statistics, checked against the network that will be compared with them.

    Where the suite wants the kernel distance or neighbours and the file has images instead of features (ADM's npz),
    their features are computed.

    Args:
        suite: the protocol.
        network: its feature network; None where its weights are missing and other metrics are left: then the file is
            read, and nothing is compared with it.
        progress: show a bar where features are computed.

    Raises:
        UserError: the file is missing or damaged, of another network, resize or resolution, of another dimension,
            does not say what made it and neither does the suite, or has no features where ``kid`` needs them; or the
            same of CMMD's reference, or of that of the second features.
    """
    file = suite.reference_file()
    reference = read_reference(file, suite.features.partition(":")[0])
    if network is not None:
        reference = _checked(reference, file, suite, network, progress)
    return replace(reference, embeddings=_embeddings(suite, network, reference), second=_second(suite))


def _embeddings(suite: Suite, network: FeatureNetwork | None, reference: Reference) -> Tensor | None:
    """What CMMD compares with; None where the suite has no CMMD, or its network's weights are missing."""
    if suite.cmmd is None or (network is None and suite.cmmd == suite.features):
        return None
    file = suite.cmmd_reference_file()
    found = reference if file is None else read_reference(file)
    if file is not None:
        try:
            sha256 = features_sha256(suite.cmmd)
        except MissingWeights:
            return None
        mine = {"features_sha256": sha256, "resolution": suite.resolution}
        _check_protocol(file, found.protocol, mine, suite.precision)
    if found.features is None:
        raise UserError(
            f"{file or suite.reference_file()} holds no features, which cmmd needs: remake it with stepdistill stats"
        )
    _check_count(file or suite.reference_file(), len(found.features), 3)
    return found.features


def _second(suite: Suite) -> Moments | None:
    """What the second features are compared with; None where the suite has none, or their weights are missing."""
    file = suite.second_reference_file()
    if suite.second_features is None or file is None:
        return None
    try:
        sha256 = features_sha256(suite.second_features)
    except MissingWeights:
        return None
    found = read_reference(file)
    _check_protocol(
        file, found.protocol, {"features_sha256": sha256, "resolution": suite.resolution}, suite.precision
    )
    return found.moments


def _checked(
    reference: Reference, file: Path, suite: Suite, network: FeatureNetwork, progress: bool
) -> Reference:
    """The statistics, which fit the suite and its network; with features where they are needed and can be had."""
    dimension = len(reference.moments.total)
    if dimension != network.dimension:
        raise UserError(
            f"{file} has {dimension} features, {network.name} has {network.dimension}: another network made it"
        )
    if reference.protocol:
        mine = {
            "features_sha256": network.sha256,
            "resize": network.resize,
            "resolution": suite.resolution,
        }
        _check_protocol(file, reference.protocol, mine, suite.precision)
    else:
        _check_statement(file, suite, network)
    if reference.has_images and (suite.kid or suite.neighbours):
        reference = replace(reference, features=_features_of(open_images(file), network, progress))
    if suite.kid and reference.features is None:
        raise UserError(
            f"{file} holds no features, which kid needs: remake it with stepdistill stats, or set kid to false"
        )
    if reference.features is not None:
        _check_count(file, len(reference.features), max(3 * suite.kid, suite.neighbours + 1))
    if suite.sfid and reference.spatial is None:
        raise UserError(
            f"{file} holds no spatial moments, which sfid needs: remake it with stepdistill stats --spatial, take "
            "ADM's npz, or set sfid to false"
        )
    return reference


def _check_count(file: Path, count: int, least: int) -> None:
    """There are as many real images as the metrics need that compare single ones."""
    if count < least:
        raise UserError(
            f"{file} is of {count} images, the suite's metrics need {least}: make statistics of more, or leave them out"
        )


def _check_protocol(
    file: Path, protocol: Mapping[str, Any], mine: Mapping[str, Any], precision: Precision
) -> None:
    """What the file says of itself is what the suite does; one of float32, which says no precision, serves any."""
    protocol = {"precision": precision, **protocol}
    for key, value in {**mine, "precision": precision}.items():
        if key not in protocol:
            raise UserError(f"{file} does not say its {key}: remake it with stepdistill stats")
        if protocol[key] != value:
            raise UserError(
                f"{file} was made with {key} {protocol[key]}, the suite has {value}: remake it with stepdistill stats"
            )


def _check_statement(file: Path, suite: Suite, network: FeatureNetwork) -> None:
    """What the suite says of a file that says nothing is what the suite does."""
    stated = suite.reference_protocol.model_dump() if suite.reference_protocol is not None else {}
    mine = {
        "features": suite.features.partition(":")[0],
        "resize": suite.resize,
        "resolution": suite.resolution,
        "features_sha256": network.sha256,
    }
    for key, value in mine.items():
        theirs = stated.get(key)
        if theirs is None and key in STATED:
            raise UserError(
                f"{file} does not say its {key}: state reference_protocol.{key} in the suite, as its makers give it"
            )
        if theirs is not None and theirs != value:
            raise UserError(
                f"{file} was made with {key} {theirs}, the suite has {value}: take the reference of its protocol"
            )


def for_reference(suite: Suite, file: Path) -> Suite:
    """The suite with another reference, which its label then names. A suite that leaves n open (``folder``) takes
    features, resize, resolution and precision from what the file says of itself: give n after it. The suite's own file
    in another place changes nothing, and what a suite states of its file (``reference_protocol``) is kept where the
    other one has the same name.

    Raises:
        UserError: the file is missing, damaged, or does not say what made it.
    """
    if not file.is_file():
        raise UserError(f"no reference statistics {file}: make them with stepdistill stats")
    changed: dict[str, Any] = {"reference": str(file.absolute())}
    if suite.reference and not _is_own(suite, file):
        changed["derived"] = (*suite.derived, f"reference={file.name}")
        if suite.second_features is not None:  # whose statistics are of the suite's own images
            changed |= {"second_features": None, "second_reference": None}
    if file.name != Path(suite.reference).name:  # what the suite states is of its own file
        changed["reference_protocol"] = None
    if suite.n == 0:
        reference = read_reference(file)
        if not set(STATED) <= set(reference.protocol):
            raise UserError(
                f"{file} does not say what made it: write a suite with features, resize, resolution and "
                "reference_protocol, as docs/measure/images.md shows"
            )
        changed |= {key: reference.protocol[key] for key in ("features", "resolution")}
        changed["precision"] = reference.protocol.get("precision", suite.precision)
        changed |= {
            "resize": str(reference.protocol["resize"]).split()[0],
            "kid": reference.features is not None,
        }
    return suite.changed(changed)


def _is_own(suite: Suite, file: Path) -> bool:
    """Whether a file is the suite's own reference: of its name and, where that one is here, of its content."""
    if file.name != Path(suite.reference).name:
        return False
    try:
        own = suite.reference_file()
    except UserError:
        return True
    return sha256_of(own) == sha256_of(file)


def _features_of(source: ImageSource, network: FeatureNetwork, progress: bool) -> Tensor:
    kept = []
    numbered = source.numbered(128, pinned=network.device.type == "cuda")
    with (
        closing(ahead(numbered, source.ahead)) as read,
        bar(source.found, f"features of {source.label}", unit="image", shown=progress) as shown,
    ):
        for _, pixels in read:
            kept.append(network.images(pixels).cpu())
            shown.update(len(pixels))
    return torch.cat(kept)
