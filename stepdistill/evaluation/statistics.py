"""Reference statistics made from real images, with their protocol in the header."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.data.image_archives import open_images
from stepdistill.data.image_sources import ImageSource
from stepdistill.errors import UserError
from stepdistill.features.inception import InceptionFeatures
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.frechet import Moments
from stepdistill.metrics.sfid import DIMENSION
from stepdistill.system.emoji import emoji_images
from stepdistill.system.files import written_whole
from stepdistill.system.log import bar, say
from stepdistill.system.prefetch import ahead

if TYPE_CHECKING:
    from stepdistill.evaluation.suite import Suite


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
    suite: Suite, output: Path, *, second: bool = False, device: torch.device | str = "cpu", batch: int = 256
) -> None:
    """Write the statistics of the suite's real images: those of :func:`make_statistics`, with features where the suite
    has ``kid`` or ``neighbours``. With ``second``: of its second features, mean and covariance alone.

    Raises:
        UserError: the suite's images are neither ``emoji`` nor a folder or archive of images.
    """
    embedded, keep = suite.images == "emoji", (suite.kid or suite.neighbours > 0) and not second
    found, spatial = (
        suite.second_network(device) if second else suite.network(device),
        suite.sfid and not second,
    )
    if found is None:
        raise UserError(f"suite {suite.label} has no second features")
    try:
        source = open_images(emoji_images() if embedded else suite.images, resolution=suite.resolution)
    except UserError as error:
        raise UserError(f"suite {suite.label}: {error}; or let images be emoji") from None
    if embedded:  # their hash would say nothing that the package's version does not
        source.label = suite.images
        _write(output, *_statistics(source, found, suite.resolution, keep, spatial, batch, False))
        return
    make_statistics(
        source,
        found,
        output,
        resolution=suite.resolution,
        keep_features=keep,
        spatial=spatial,
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
    moments, kept = Moments.empty(network.dimension, network.device), []
    places = Moments.empty(DIMENSION if spatial else 0, network.device)
    numbered = source.numbered(batch, ordered=False, pinned=network.device.type == "cuda")
    with (
        closing(ahead(numbered, source.ahead)) as read,
        bar(source.found, f"statistics of {source.label}", unit="image", shown=progress) as shown,
    ):
        for _, pixels in read:
            if spatial:
                features, of_places = _inner_features(network, pixels)
                places.add(of_places)
            else:
                features = network.images(pixels)  # [B, D]
            if not features.isfinite().all():
                raise UserError(f"{network.name} gives NaN or Inf for images of {source.label}")
            moments.add(features)
            if keep_features:
                kept.append(features.half().cpu())
            shown.update(len(pixels))
    if moments.count < 2:
        raise UserError(f"{source.label}: statistics need at least 2 images, there are {moments.count}")
    tensors = {"mean": moments.mean.cpu(), "covariance": moments.covariance.cpu()}
    if keep_features:
        tensors["features"] = torch.cat(kept)
    if spatial:
        tensors |= {"spatial_mean": places.mean.cpu(), "spatial_covariance": places.covariance.cpu()}
    protocol = {
        "images": source.label,
        "n": moments.count,
        "resolution": resolution,
        "features": network.name,
        "features_sha256": network.sha256,
        "resize": network.resize,
    }
    if network.precision != "float32":
        protocol["precision"] = network.precision
    return tensors, protocol


def _inner_features(network: FeatureNetwork, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, D] and spatial features [B, 2023] of images."""
    found = network.activations(pixels) if isinstance(network, InceptionFeatures) else None
    if found is None or found.spatial is None:
        raise UserError(f"features {network.name} have no spatial features: sFID is of inception")
    return found.features, found.spatial


def _write(output: Path, tensors: dict[str, Tensor], protocol: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    output.parent.mkdir(parents=True, exist_ok=True)
    # One key, so that the header has one order and equal statistics are equal files.
    with written_whole(output) as temporary:
        save_file(tensors, temporary, metadata={"protocol": json.dumps(protocol, sort_keys=True)})
