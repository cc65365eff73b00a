"""Features of any module: a user's own network in the evaluation, and networks of fixed random weights in its tests."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.features.network import Precision
from stepdistill.features.resize import Resize, resize
from stepdistill.system.float32 import full_float32
from stepdistill.system.memory import sent


class ModuleFeatures:
    """A module that maps float images [B, 3, S, S] in [0, 255] to features [B, D].

    Args:
        module: put in eval mode and on the device.
        name: how results name it.
        dimension: D.
        size: S; images come resized to it.
        mode: how: see :mod:`stepdistill.features.resize`.
        device: where it runs.
    """

    fd_scale = 1.0
    clip_name = None
    precision: Precision = "float32"

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        dimension: int,
        size: int,
        mode: Resize = "clean",
        device: torch.device | str = "cpu",
    ) -> None:
        self._module = module.eval().requires_grad_(False).to(device)
        self._size, self._mode, self.device = size, mode, torch.device(device)
        self.name, self.dimension, self.kernel_scale = name, dimension, 1 / dimension
        self.fd_name = f"FD ({name})"
        self.resize = f"{mode} to {size}"
        self.sha256 = state_sha256(module)

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._module(resize(sent(pixels, self.device), self._size, self._mode))
        if features.shape != (len(pixels), self.dimension):
            raise UserError(
                f"features {self.name} have shape {list(features.shape)} for {len(pixels)} images; they must have "
                f"[{len(pixels)}, {self.dimension}]"
            )
        return features.float()

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise UserError(f"features {self.name} have no texts: set clip_score to false in the suite")


def user_network(spec: str, mode: str, device: torch.device) -> ModuleFeatures:
    """What the function of ``module:PACKAGE.MODULE:FUNCTION`` makes when it is called with the resize mode and device.

    Raises:
        UserError: there is no such function, or it makes something else.
    """
    place, _, name = spec.removeprefix("module:").rpartition(":")
    try:
        factory = getattr(importlib.import_module(place), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"features {spec!r}: {error}; give module:PACKAGE.MODULE:FUNCTION of a module that Python finds"
        ) from None
    network = factory(mode, device)
    if not isinstance(network, ModuleFeatures):
        raise UserError(
            f"features {spec!r}: the function made a {type(network).__name__}, not ModuleFeatures"
        )
    network.name = spec
    return network


def state_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's tensors with their names, types and shapes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
