"""Reads files of reference statistics: our safetensors, npz of clean-fid, EDM and ADM, pickles of EDM2."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.pickled_statistics import read_pickled_statistics
from stepdistill.metrics.frechet import Moments
from stepdistill.system.files import sha256_of
from stepdistill.system.parsing import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray


UNSTATED_COUNT = 1_000_000
"""Images of a file that does not say how many; the number does not enter the distance."""
LARGEST_STATISTICS = 1 << 30
"""Bytes of an array of statistics: twice those of a covariance of 8192 features in float64."""
INDEFINITE = 1e-3
"""The least eigenvalue of a covariance may lie this far below 0, in parts of the largest. Of the emoji's covariance,
float32 leaves -6e-9 and float16 -5e-5."""
ROUNDING = 1e-6
"""An imaginary part up to this share of the real one is rounding."""
_EDM2_KEYS = {"inception": "fid", "dinov2": "fd_dinov2"}


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images.

    Attributes:
        moments: mean and covariance of their features.
        features: the features themselves [N, D] float32, where the file has them (the kernel distance needs them).
        protocol: what the file says of itself; empty for npz and pickles, which say nothing.
        sha256: of the file.
        spatial: moments of the spatial features of sFID, where the file has them.
        has_images: the file holds the images themselves (arr_0 of ADM's npz).
        embeddings: CLIP embeddings [M, E] float32 of the real images, for CMMD.
        second: moments of their features in the suite's second network.
    """

    moments: Moments
    features: Tensor | None
    protocol: Mapping[str, Any]
    sha256: str
    spatial: Moments | None = None
    has_images: bool = False
    embeddings: Tensor | None = None
    second: Moments | None = None

    def on(self, device: torch.device | str) -> Reference:
        """The same with all statistics on a device; moments on the CPU where that has no float64."""
        features, embeddings = (None if x is None else x.to(device) for x in (self.features, self.embeddings))
        spatial, second = (None if x is None else x.on(device) for x in (self.spatial, self.second))
        moments = self.moments.on(device)
        return replace(
            self, moments=moments, features=features, spatial=spatial, embeddings=embeddings, second=second
        )


def read_reference(file: Path, network: str = "inception") -> Reference:
    """The statistics of a file, whatever made them.

    Args:
        file: safetensors, npz or pkl.
        network: the kind of network, which chooses among the statistics of an EDM2 pickle.

    Raises:
        UserError: the file is damaged, holds no statistics, or they are not those of real numbers: complex, not
            finite, not symmetric, or with variances below 0.
    """
    if file.suffix == ".npz":
        return _read_npz(file)
    if file.suffix in (".pkl", ".pickle"):
        return _read_pickle(file, network)
    return _read_safetensors(file)


def _read_safetensors(file: Path) -> Reference:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            protocol: dict[str, Any] = dict(parse_json((content.metadata() or {}).get("protocol", "{}")))
            if "n" in protocol:
                protocol["n"] = int(protocol["n"])
            tensors: dict[str, Any] = {key: content.get_tensor(key) for key in sorted(content.keys())}
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        OverflowError,
        KeyError,
        AttributeError,
    ) as error:
        raise UserError(
            f"{file} is not a safetensors file ({error}); remake it with stepdistill stats"
        ) from None
    if not {"mean", "covariance"} <= set(tensors) or "n" not in protocol:
        found = ", ".join(tensors) or "nothing"
        raise UserError(f"{file} holds {found}; statistics are mean and covariance, with their protocol")
    moments = _moments(file, _numbers(tensors["mean"]), _numbers(tensors["covariance"]), protocol["n"])
    features = tensors["features"].float() if "features" in tensors else None
    spatial = None
    if {"spatial_mean", "spatial_covariance"} <= set(tensors):
        mean, covariance = (_numbers(tensors[key]) for key in ("spatial_mean", "spatial_covariance"))
        spatial = _moments(file, mean, covariance, protocol["n"])
    return Reference(moments, features, protocol, sha256_of(file), spatial)


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """An array; of the types that numpy lacks, in float64."""
    array: NDArray[Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _read_npz(file: Path) -> Reference:
    damage = (
        zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError,
        AttributeError, OverflowError, SyntaxError, struct.error, tokenize.TokenError,
    )  # fmt: skip
    try:
        _check_sizes(file)
        with np.load(file, allow_pickle=False) as content:
            names = set(content.files)
            found = {key: content[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in names}
    except damage as error:
        raise UserError(
            f"{file} is damaged, cut off or not an npz of numbers ({' '.join(str(error).split())[:200]}): get it again"
        ) from None
    if not {"mu", "sigma"} <= set(found):
        images = "; make statistics of its images with stepdistill stats" if "arr_0" in names else ""
        raise UserError(
            f"{file} holds {', '.join(sorted(names)) or 'nothing'}; reference statistics are mu and sigma{images}"
        )
    moments = _moments(file, found["mu"], found["sigma"], UNSTATED_COUNT)
    spatial = None
    if {"mu_s", "sigma_s"} <= set(found):
        spatial = _moments(file, found["mu_s"], found["sigma_s"], UNSTATED_COUNT)
    return Reference(moments, None, {}, sha256_of(file), spatial, "arr_0" in names)


def _check_sizes(file: Path) -> None:
    """Statistics in a zip are no larger, unpacked, than those of the largest networks."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{member.filename} is compressed by bzip2 or LZMA, which numpy does not write"
                )
            if member.filename in ("mu.npy", "sigma.npy", "mu_s.npy", "sigma_s.npy"):
                if member.file_size > LARGEST_STATISTICS:
                    raise ValueError(f"{member.filename} claims {member.file_size} bytes")
                _check_claim(archive, member)


def _check_claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """numpy makes room for what a head claims before it reads a byte of it."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{member.filename} claims {list(shape)} numbers and has {member.file_size} bytes")


def _read_pickle(file: Path, network: str) -> Reference:
    content = read_pickled_statistics(file)
    statistics: Any = content
    if "mu" not in content:
        key = _EDM2_KEYS.get(network, network)
        if not isinstance(content.get(key), dict):
            found = ", ".join(sorted(content)) or "nothing"
            raise UserError(
                f"{file} holds {found}; statistics of {network} are {key}: another network made it"
            )
        statistics = content[key]
    if not {"mu", "sigma"} <= set(statistics):
        raise UserError(
            f"{file} holds {', '.join(sorted(statistics))}; reference statistics are mu and sigma"
        )
    count = content.get("num_images")
    count = int(count) if isinstance(count, (int, float)) and count >= 2 else UNSTATED_COUNT
    moments = _moments(file, statistics["mu"], statistics["sigma"], count)
    return Reference(moments, None, {}, sha256_of(file))


def _moments(file: Path, mean: Any, covariance: Any, count: int) -> Moments:
    """Moments of a mean [D] and a covariance [D, D] that can be ones."""
    try:
        mean, covariance = (torch.from_numpy(_real(file, np.asarray(x))) for x in (mean, covariance))
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: mean and covariance are not arrays of numbers") from None
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UserError(f"{file}: mean and covariance are {shapes}; they must be [D] and [D, D]")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{file}: mean or covariance has NaN or Inf; get it again")
    if (covariance - covariance.T).abs().max() > 1e-4 * covariance.abs().max():
        raise UserError(f"{file}: the covariance is not symmetric, so it is none; get it again")
    # What has a Cholesky factor once this is added needs no eigenvalues, which take twenty times as long.
    allowed = INDEFINITE * float(covariance.diagonal().max()) if len(mean) else 0.0
    if not torch.linalg.cholesky_ex(covariance + allowed * torch.eye(len(mean), dtype=torch.float64))[1]:
        return Moments.from_statistics(mean, covariance, count)
    values = torch.linalg.eigvalsh(covariance)  # [D], ascending
    if values[0] < -INDEFINITE * values[-1].abs():
        raise UserError(
            f"{file}: the covariance has an eigenvalue of {float(values[0]):.3g} (the largest is "
            f"{float(values[-1]):.3g}): it is not positive semidefinite, so it is none; get it again"
        )
    return Moments.from_statistics(mean, covariance, count)


def _real(file: Path, array: NDArray[Any]) -> NDArray[np.float64]:
    """Numbers as float64; the imaginary part that a matrix square root leaves behind is dropped."""
    if array.dtype.kind == "c":
        if np.abs(array.imag).max(initial=0) > ROUNDING * np.abs(array.real).max(initial=0):
            raise UserError(
                f"{file}: mean or covariance is complex; statistics are real numbers, get it again"
            )
        array = array.real
    return np.array(array, np.float64)
