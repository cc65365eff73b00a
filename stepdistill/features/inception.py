"""FID's features: where the weights of its Inception lie, how they are read, and which resize goes with them.

Two public files hold the same weights: a state dict, which this package's own network reads, and NVIDIA's TorchScript.
The resizes are those of resize.py, but that the TorchScript does tf1's itself. Neither file is shipped or downloaded.
A file is known by its SHA-256; weights of another hash are used when given by path, and the distance in their features
is then not called FID.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import MissingWeights, UserError, did_you_mean
from stepdistill.features.inception_network import Activations, Inception, Layer
from stepdistill.features.network import DTYPES, Precision, titled
from stepdistill.features.resize import RESIZES, Resize, resize
from stepdistill.system.float32 import full_float32
from stepdistill.system.memory import sent
from stepdistill.system.shipped import cache_folder
from stepdistill.system.tensor_files import read_tensors

STATE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
PUBLIC = {
    "pt_inception-2015-12-05-6726825d.pth": STATE_SHA256,  # pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth": STATE_SHA256,  # torch-fidelity, the same bytes
    "inception-2015-12-05.pt": TORCHSCRIPT_SHA256,  # clean-fid, StyleGAN, EDM
}
"""File names of the public weights, the first found is taken, and their SHA-256."""
SIZE = 299


def usual_folders() -> list[Path]:
    """Where the FID tools keep these files: stepdistill's cache, PyTorch's hub, the temporary folder (clean-fid)."""
    places = [
        cache_folder(),
        Path(torch.hub.get_dir()) / "checkpoints",
        Path(tempfile.gettempdir()),
        Path("/tmp"),
    ]
    return list(dict.fromkeys(places))


def find_weights() -> Path:
    """The first public weights in the usual folders.

    Raises:
        MissingWeights: there are none; the message names the files, the folders and the hashes.
    """
    folders = usual_folders()
    for name in PUBLIC:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    first, *_, script = PUBLIC
    raise MissingWeights(
        f"FID's Inception weights are not here: no {', '.join(PUBLIC)} in {', '.join(map(str, folders))}; put one of "
        f"them there or give its path as inception:FILE (SHA-256 {STATE_SHA256} of {first}, {TORCHSCRIPT_SHA256} of "
        f"{script}); features emoji, clip:FOLDER and dinov2:FOLDER need none"
    )


def check_public(file: Path, sha256: str) -> bool:
    """Whether a file is one of the public ones.

    Raises:
        UserError: it bears the name of a public file and is another: a broken or foreign download.
    """
    expected = PUBLIC.get(file.name)
    if expected is not None and sha256 != expected:
        raise UserError(
            f"{file} has SHA-256 {sha256}, the public file of that name has {expected}: load it down again, or "
            "rename it if other weights are meant"
        )
    return sha256 in PUBLIC.values()


class InceptionFeatures:
    """The 2,048 pooled features of FID, by this package's own network or by the TorchScript file.

    Args:
        file: a state dict (``.pth`` or ``.safetensors``, named as the public one is) or ``inception-2015-12-05.pt``.
        sha256: of the file.
        mode: ``clean``, ``tf1`` or ``pytorch``: see :mod:`stepdistill.features.resize`. ``pytorch`` also scales pixels
            to x / 127.5 - 1, the other two to (x - 128) / 128.
        precision: of the network; bf16 is only of a state dict's.
        device: where it runs.

    Raises:
        UserError: the mode is none, the file is broken or holds another network, or the TorchScript is asked in bf16.
    """

    fd_scale = 1.0
    dimension = 2048
    clip_name = None
    kernel_scale = 1 / 2048

    def __init__(
        self, file: Path, *, sha256: str, mode: str, precision: Precision, device: torch.device
    ) -> None:
        if mode not in RESIZES:
            raise UserError(
                f"resize {mode!r} is not a mode of Inception features {did_you_mean(mode, RESIZES)}"
            )
        self._mode: Resize = mode
        public = check_public(file, sha256)
        self._script: Any = None
        self._own: Inception | None = None
        if _is_torchscript(file):
            if precision != "float32":
                raise UserError(
                    f"features {file} are a TorchScript, which is float32: take {next(iter(PUBLIC))} for {precision}"
                )
            load: Any = torch.jit.load  # an archive of its own: nothing of Python's is run
            self._script = load(str(file), map_location=device).eval()
        else:
            self._own = _own_network(file, DTYPES[precision]).to(device)
        self.device, self.precision = device, precision
        self.name = "inception" if public else f"inception:{file}"
        self.sha256 = sha256
        title = f"FID ({mode})" if public else f"FD-Inception ({mode}; weights {sha256[:8]}, not FID's)"
        self.fd_name = titled(title, precision)
        words = {
            "clean": "bicubic, antialiased, float",
            "tf1": "bilinear",
            "pytorch": "bilinear about centres",
        }
        self.resize = f"{mode} ({words[mode]}) to {SIZE}"

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        if self._own is not None:
            found: Activations = self._own(self._prepared(pixels))
            return found.features
        if self._mode == "tf1":
            raw: Tensor = self._script(sent(pixels, self.device), return_features=True)
            return raw.flatten(1).float()
        pooled: Tensor = self._script.layers(self._prepared(pixels))
        return pooled.flatten(1).float()

    @property
    def layers_missing(self) -> str | None:
        """Why :meth:`activations` cannot be had of these weights; None where it can."""
        if self._own is not None:
            return None
        return (
            f"{self.name}: the Inception score and sFID read layers that the TorchScript file does not give; "
            f"use {next(iter(PUBLIC))} (SHA-256 {STATE_SHA256})"
        )

    @full_float32()
    def activations(self, pixels: Tensor, layer: Layer = "2048") -> Activations:
        """Features, logits without bias (for the Inception score) and spatial features (sFID) of uint8 [B, 3, H, W].

        Raises:
            UserError: the weights are the TorchScript file, whose inner layers cannot be read.
        """
        if self._own is None:
            raise UserError(str(self.layers_missing))
        found: Activations = self._own(self._prepared(pixels), layer)
        return found

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise UserError("Inception has no text features: set clip_score to false in the suite")

    def _prepared(self, pixels: Tensor) -> Tensor:
        wide = resize(sent(pixels, self.device), SIZE, self._mode)
        return wide / 127.5 - 1 if self._mode == "pytorch" else (wide - 128) / 128


def _is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with a folder of code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _own_network(file: Path, dtype: torch.dtype) -> Inception:
    """From a state dict."""
    like = f"a state dict named as {next(iter(PUBLIC))} is"
    try:
        return Inception(read_tensors(file, like), dtype)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
