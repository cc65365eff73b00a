"""Feature networks of the evaluation: images (and texts) in, features out, on the machine's own files only.

A network is named by a specification: ``emoji`` (embedded), ``clip:FOLDER`` (a transformers CLIPModel with its
tokenizer) or ``inception:FILE`` (the TorchScript Inception of Karras et al., ``inception-2015-12-05.pt``, as clean-fid
and EDM use it). Every network states how it resizes and the SHA-256 of its weights: a score without them says nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill import embedded
from stepdistill.errors import UserError, did_you_mean


class FeatureNetwork(Protocol):
    """What the evaluation needs of a network.

    Attributes:
        name: its specification, as a suite writes it.
        sha256: of its weights.
        dimension: D.
        resize: how images reach the network's resolution, in words.
        fd_name: the name of the Frechet distance in these features.
        fd_scale: what that distance is multiplied by.
        clip_name: the name of the image-text cosine, None where there are no texts.
        kernel_scale: gamma of the kernel distance.
    """

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def resize(self) -> str: ...
    @property
    def fd_name(self) -> str: ...
    @property
    def fd_scale(self) -> float: ...
    @property
    def clip_name(self) -> str | None: ...
    @property
    def kernel_scale(self) -> float: ...

    def images(self, pixels: Tensor) -> Tensor:
        """Features [B, D] float32 on the CPU of images uint8 [B, 3, H, W]."""
        ...

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, D] float32 on the CPU of prompts; only where ``clip_name`` is not None."""
        ...


def sha256_of_file(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def resize_clean(pixels: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size] in [0, 255]: antialiased bicubic on floats without rounding,
    the ``clean`` protocol (Parmar et al. 2021, 2104.11222), equal to their PIL path to 3e-3 of 255."""
    wide = pixels.float()
    if wide.shape[-2:] == (size, size):
        return wide
    wide = F.interpolate(wide, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return wide.clamp(0, 255)


class ClipFeatures:
    """A transformers CLIPModel; L2-normalised features of both towers.

    Args:
        folder: CLIPModel folder (config.json, model.safetensors).
        tokenizer: folder of its tokenizer.
        name: its specification.
        fd_name, fd_scale, clip_name: see :class:`FeatureNetwork`.
        mean, std: of the pixels in [0, 1], per channel.
        device: where it runs.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        *,
        name: str,
        fd_name: str,
        fd_scale: float,
        clip_name: str,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model: Any = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self._mean = 255 * torch.tensor(mean).view(1, 3, 1, 1).to(device)
        self._std = 255 * torch.tensor(std).view(1, 3, 1, 1).to(device)
        self._size = int(model.config.vision_config.image_size)
        self._length = int(model.config.text_config.max_position_embeddings)
        self._device = device
        self.name, self.fd_name, self.fd_scale, self.clip_name = name, fd_name, fd_scale, clip_name
        self.dimension = int(model.config.projection_dim)
        self.resize = f"clean (bicubic, antialiased, float) to {self._size}"
        self.kernel_scale = 1.0  # unit vectors: the kernel is (cosine + 1)^3
        self.sha256 = _folder_sha256(folder)

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        wide = (resize_clean(pixels.to(self._device), self._size) - self._mean) / self._std
        projected = self._model.get_image_features(pixel_values=wide).pooler_output  # [B, D]
        return F.normalize(projected.float(), dim=1).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        projected = self._model.get_text_features(
            input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
        ).pooler_output
        return F.normalize(projected.float(), dim=1).cpu()


class InceptionFeatures:
    """The 2,048 pooled features of FID, from the TorchScript file ``inception-2015-12-05.pt``.

    Args:
        file: the TorchScript file.
        mode: ``clean`` (bicubic, antialiased, then the network's layers) or ``tf1`` (the network's own bilinear
            resize, as the CIFAR and ImageNet literature has it).
        device: where it runs.
    """

    fd_scale = 1.0
    dimension = 2048
    clip_name = None
    kernel_scale = 1 / 2048

    def __init__(self, file: Path, *, mode: str, device: torch.device) -> None:
        if mode not in ("clean", "tf1"):
            raise UserError(
                f"resize {mode!r} is not a mode of Inception features {did_you_mean(mode, ('clean', 'tf1'))}"
            )
        self._mode = mode
        load: Any = torch.jit.load  # TorchScript: an archive of its own, nothing of Python's is run
        self._model = load(str(file), map_location=device).eval()
        self._device = device
        self.name = f"inception:{file}"
        self.sha256 = sha256_of_file(file)
        self.fd_name = f"FID ({mode})"
        self.resize = (
            "clean (bicubic, antialiased, float) to 299" if mode == "clean" else "tf1 (bilinear) to 299"
        )

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        if self._mode == "tf1":
            raw: Tensor = self._model(pixels.to(self._device), return_features=True)
            return raw.flatten(1).float().cpu()
        wide = (resize_clean(pixels.to(self._device), 299) - 128) / 128
        pooled: Tensor = self._model.layers(wide)
        return pooled.flatten(1).float().cpu()

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise UserError("Inception has no text features: set clip_score to false in the suite")


def load_features(spec: str, *, resize: str = "clean", device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network a specification names; loaded once per process.

    Args:
        spec: ``emoji``, ``clip:FOLDER`` or ``inception:FILE``.
        resize: ``clean``, or ``tf1`` for Inception.
        device: where it runs.

    Raises:
        UserError: the specification is unknown, or its file is missing.
    """
    return _load(spec, resize, torch.device(device))


def features_sha256(spec: str) -> str:
    """The ``sha256`` of the network a specification names, without loading it.

    Raises:
        UserError: the specification is unknown, or its file is missing.
    """
    kind, path = _locate(spec)
    return sha256_of_file(path) if kind == "inception" else _folder_sha256(path)


def _folder_sha256(folder: Path) -> str:
    """Of the only safetensors file of a folder, or of the digests of its shards in order."""
    digests = [sha256_of_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _locate(spec: str) -> tuple[str, Path]:
    """``emoji``, ``clip`` or ``inception``, and where its weights lie."""
    kind, _, location = spec.partition(":")
    if spec == "emoji":
        return "emoji", embedded.features_folder()
    if kind not in ("clip", "inception") or not location:
        known = "emoji, clip:FOLDER (a transformers CLIPModel), inception:FILE (inception-2015-12-05.pt)"
        raise UserError(f"features {spec!r} are not known; there are {known}")
    path = Path(location).expanduser()
    if kind == "inception" and not path.is_file():
        what = "download inception-2015-12-05.pt, the file clean-fid uses, and give its path"
        raise UserError(f"features {spec!r}: no file {path}; {what}")
    if kind == "clip" and not (path / "config.json").is_file():
        raise UserError(f"features {spec!r}: {path} is not a transformers CLIPModel folder (no config.json)")
    return kind, path


@cache
def _load(spec: str, resize: str, device: torch.device) -> FeatureNetwork:
    kind, path = _locate(spec)
    if kind == "emoji":
        return ClipFeatures(
            path,
            embedded.tokenizer_folder(),
            name="emoji",
            fd_name="FD-emoji",
            fd_scale=100.0,
            clip_name="CLIP-emoji",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            device=device,
        )
    if kind == "inception":
        return InceptionFeatures(path, mode=resize, device=device)
    mean, std = _pixel_statistics(path)
    return ClipFeatures(
        path,
        path,
        name=spec,
        fd_name=f"FD-CLIP ({path.name})",
        fd_scale=1.0,
        clip_name=f"CLIP score ({path.name})",
        mean=mean,
        std=std,
        device=device,
    )


def _pixel_statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of preprocessor_config.json, OpenAI's where the folder has none."""
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    mean = config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    return mean, config.get("image_std", (0.26862954, 0.26130258, 0.27577711))
