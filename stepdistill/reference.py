"""Reference statistics: moments of the real images' features, read in the formats of the field and made by our own.

    safetensors  ours: mean, covariance, perhaps features, and the protocol that made them in the header
    npz          clean-fid, pytorch-fid, EDM: mu, sigma; ADM: also mu_s, sigma_s (of sFID) and arr_0, the images
    pkl          EDM2: {"fid": {"mu", "sigma"}, "fd_dinov2": {...}}, read without running anything

A distance to statistics of another network, resize or resolution is a number without a meaning. Ours say what made
them; for the others the suite must say it (``reference_protocol``). What differs, or is not known, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.embedded import emoji_images
from stepdistill.errors import MissingWeights, UserError
from stepdistill.features import FeatureNetwork, features_sha256, load_features
from stepdistill.image_sources import ImageSource, open_images
from stepdistill.inception_features import InceptionFeatures
from stepdistill.log import bar, quiet_loading, say
from stepdistill.metrics.frechet import Moments
from stepdistill.metrics.sfid import DIMENSION
from stepdistill.reference_files import Reference, read_reference

if TYPE_CHECKING:
    from stepdistill.suite import Suite

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
            same of CMMD's reference.
    """
    file = suite.reference_file()
    reference = read_reference(file, suite.features.partition(":")[0])
    if network is not None:
        reference = _checked(reference, file, suite, network, progress)
    return replace(reference, embeddings=_embeddings(suite, network, reference))


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
        _check_protocol(file, found.protocol, mine)
    if found.features is None:
        raise UserError(
            f"{file or suite.reference_file()} holds no features, which cmmd needs: remake it with stepdistill stats"
        )
    _check_count(file or suite.reference_file(), len(found.features), 3)
    return found.features


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
        _check_protocol(file, reference.protocol, mine)
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


def _check_protocol(file: Path, protocol: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """What the file says of itself is what the suite does."""
    for key, value in mine.items():
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


def network_of(features: str, resize: str, device: torch.device | str | None = None) -> FeatureNetwork:
    """The network, which must have the resize mode: one that has only another would make other statistics than asked.

    Args:
        features: its specification, as a suite writes it.
        resize: ``clean`` or another mode of the network.
        device: None is CUDA if there is one.

    Raises:
        UserError: the network is unknown, its file is missing, or it has no such mode.
    """
    quiet_loading()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = load_features(features, resize=resize, device=device)
    if mode_of(network.resize) != resize:
        raise UserError(f"features {features} have no resize {resize!r}; they have {network.resize!r}")
    return network


def mode_of(resize: str) -> str:
    """The mode in a network's words: ``clean`` of ``clean (bicubic, antialiased, float) to 32``."""
    return resize.split()[0] if resize.split() else ""


def make_statistics(
    source: ImageSource,
    network: FeatureNetwork,
    output: Path,
    *,
    resolution: int,
    keep_features: bool = True,
    spatial: bool = False,
    batch: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the statistics of images to a safetensors file, with the protocol in its header, which is given back.

    Tensors: mean [D] and covariance [D, D] in float64 and, unless left out, features [N, D] in float16 (their rounding
    moves the kernel distance by less than 1e-6 on the emoji); for sFID spatial_mean [2023] and spatial_covariance in
    float64. Memory: one batch of images, and the features.

    Args:
        source: the images, opened at ``resolution``.
        network: the feature network.
        output: the file.
        resolution: of the images; 0 where each has its own size.
        keep_features: for the kernel distance, CMMD, precision, recall, density and coverage.
        spatial: also the moments that sFID needs; Inception from a state dict alone has them.
        batch: images at a time.
        progress: show a bar. What was converted and skipped is told on stderr in any case.

    Raises:
        UserError: fewer than 2 images, features that are not finite, another ending than .safetensors, or a network
            without spatial features where they are asked.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: statistics are safetensors files; let the name end in .safetensors")
    try:
        tensors, protocol = _statistics(source, network, resolution, keep_features, spatial, batch, progress)
    finally:
        for line in source.remarks():
            say(line)
    protocol |= {
        "pixels_sha256": source.pixels_sha256(),
        "converted": dict(source.converted),
        "skipped": len(source.skipped),
    }
    _write(output, tensors, protocol)
    return protocol


def make_reference(
    suite: Suite, output: Path, *, device: torch.device | str = "cpu", batch: int = 256
) -> None:
    """Write the statistics of the suite's real images: those of :func:`make_statistics`, with features where the suite
    has ``kid`` or ``neighbours``.

    Raises:
        UserError: the suite's images are neither ``emoji`` nor a folder or archive of images.
    """
    embedded, keep = suite.images == "emoji", suite.kid or suite.neighbours > 0
    try:
        source = open_images(emoji_images() if embedded else suite.images, resolution=suite.resolution)
    except UserError as error:
        raise UserError(f"suite {suite.label}: {error}; or let images be emoji") from None
    if embedded:  # their hash would say nothing that the package's version does not
        source.label = suite.images
        network = suite.network(device)
        _write(output, *_statistics(source, network, suite.resolution, keep, suite.sfid, batch, False))
        return
    make_statistics(
        source,
        suite.network(device),
        output,
        resolution=suite.resolution,
        keep_features=keep,
        spatial=suite.sfid,
        batch=batch,
        progress=False,
    )


def _statistics(
    source: ImageSource,
    network: FeatureNetwork,
    resolution: int,
    keep_features: bool,
    spatial: bool,
    batch: int,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    moments, kept = Moments.empty(network.dimension), []
    places = Moments.empty(DIMENSION if spatial else 0)
    with bar(source.found, f"statistics of {source.label}", unit="image", shown=progress) as shown:
        for pixels in source.batches(batch, ordered=False):
            if spatial:
                features, of_places = _inner_features(network, pixels)
                places.add(of_places)
            else:
                features = network.images(pixels)  # [B, D]
            if not features.isfinite().all():
                raise UserError(f"{network.name} gives NaN or Inf for images of {source.label}")
            moments.add(features)
            if keep_features:
                kept.append(features.half())
            shown.update(len(pixels))
    if moments.count < 2:
        raise UserError(f"{source.label}: statistics need at least 2 images, there are {moments.count}")
    tensors = {"mean": moments.mean, "covariance": moments.covariance}
    if keep_features:
        tensors["features"] = torch.cat(kept)
    if spatial:
        tensors |= {"spatial_mean": places.mean, "spatial_covariance": places.covariance}
    protocol = {
        "images": source.label,
        "n": moments.count,
        "resolution": resolution,
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
    }
    return tensors, protocol


def _inner_features(network: FeatureNetwork, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, D] and spatial features [B, 2023] of images."""
    found = network.activations(pixels) if isinstance(network, InceptionFeatures) else None
    if found is None or found.spatial is None:
        raise UserError(f"features {network.name} have no spatial features: sFID is of inception")
    return found.features, found.spatial


def for_reference(suite: Suite, file: Path) -> Suite:
    """The suite with another reference. A suite that leaves n open (``folder``) takes features, resize and resolution
    from what the file says of itself. What a suite states of its file (``reference_protocol``) is kept where the other
    one has the same name.

    Raises:
        UserError: the file is missing, damaged, or does not say what made it.
    """
    if not file.is_file():
        raise UserError(f"no reference statistics {file}: make them with stepdistill stats")
    changed: dict[str, Any] = {"reference": str(file.absolute())}
    if file.name != Path(suite.reference).name:  # what the suite states is of its own file
        changed["reference_protocol"] = None
    if suite.n == 0:
        reference = read_reference(file)
        if not set(STATED) <= set(reference.protocol):
            raise UserError(
                f"{file} does not say what made it: write a suite with features, resize, resolution and "
                "reference_protocol, as eval/README.md shows"
            )
        changed |= {key: reference.protocol[key] for key in ("features", "resolution")}
        changed |= {
            "resize": str(reference.protocol["resize"]).split()[0],
            "kid": reference.features is not None,
        }
    return suite.changed(changed)


def _features_of(source: ImageSource, network: FeatureNetwork, progress: bool) -> Tensor:
    kept = []
    with bar(source.found, f"features of {source.label}", unit="image", shown=progress) as shown:
        for pixels in source.batches(128):
            kept.append(network.images(pixels))
            shown.update(len(pixels))
    return torch.cat(kept)


def _write(output: Path, tensors: dict[str, Tensor], protocol: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    output.parent.mkdir(parents=True, exist_ok=True)
    # One key, so that the header has one order and equal statistics are equal files.
    save_file(tensors, output, metadata={"protocol": json.dumps(protocol, sort_keys=True)})
    output.chmod(0o644)
