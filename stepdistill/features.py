"""Feature networks of the evaluation: images (and texts) in, features out, on the machine's own files only.

A network is named by a specification:

    emoji             embedded
    inception         FID's Inception, from the folders where the FID tools keep it
    inception:FILE    the same from a file: a state dict or clean-fid's TorchScript
    clip:FOLDER       a transformers CLIPModel with its tokenizer, or a hub id: clip:openai/clip-vit-base-patch32
    dinov2:FOLDER     a transformers Dinov2Model, or a hub id: dinov2:facebook/dinov2-large
    module:NAME       one's own: the function NAME, as package.module:function, makes it (see module_features.py)

Every network states how it resizes and the SHA-256 of its weights: a score without them says nothing.
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
from stepdistill.dino_features import DinoFeatures
from stepdistill.errors import MissingWeights, UserError, did_you_mean
from stepdistill.inception_features import InceptionFeatures, check_public, find_weights
from stepdistill.module_features import user_network
from stepdistill.precision import full_float32
from stepdistill.resize import resize_clean

__all__ = [
    "ClipFeatures",
    "DinoFeatures",
    "FeatureNetwork",
    "InceptionFeatures",
    "features_sha256",
    "load_features",
    "resize_clean",
    "sha256_of_file",
]


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


class ClipFeatures:
    """A transformers CLIPModel; L2-normalised features of both towers.

    Args:
        folder: CLIPModel folder (config.json, model.safetensors).
        tokenizer: folder of its tokenizer.
        name: its specification.
        sha256: of its weights.
        fd_name, fd_scale, clip_name: see :class:`FeatureNetwork`.
        mean, std: of the pixels in [0, 1], per channel.
        device: where it runs.

    ``logit_scale`` is the factor of the cosine in the model's own loss, which PickScore reads.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Path,
        *,
        name: str,
        sha256: str,
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
        self.logit_scale = float(model.logit_scale.exp())
        self.resize = f"clean (bicubic, antialiased, float) to {self._size}"
        self.kernel_scale = 1.0  # unit vectors: the kernel is (cosine + 1)^3
        self.sha256 = sha256

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit features [B, D] of images [B, 3, H, W] in [0, 255], uint8 or float, with a graph."""
        wide = (resize_clean(pixels.to(self._device), self._size) - self._mean) / self._std
        projected = self._model.get_image_features(pixel_values=wide).pooler_output  # [B, D]
        return F.normalize(projected.float(), dim=1)

    @torch.no_grad()
    @full_float32()
    def images(self, pixels: Tensor) -> Tensor:
        return self.embed(pixels).cpu()

    @torch.no_grad()
    @full_float32()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        projected = self._model.get_text_features(
            input_ids=tokens.input_ids.to(self._device), attention_mask=tokens.attention_mask.to(self._device)
        ).pooler_output
        return F.normalize(projected.float(), dim=1).cpu()


def load_features(spec: str, *, resize: str = "clean", device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network a specification names; loaded once per process.

    Args:
        spec: see the head of this module.
        resize: ``clean``, for Inception also ``tf1`` and ``pytorch``.
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
    if spec.startswith("module:"):
        return load_features(spec).sha256
    kind, path = _locate(spec)
    if kind != "inception":
        return _folder_sha256(path, kind)
    sha256 = sha256_of_file(path)
    check_public(path, sha256)
    return sha256


PIXELS = {
    "emoji": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of the pixels in [0, 1] that the networks of a kind are used to."""


def _pixel_statistics(folder: Path, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of preprocessor_config.json; those of its kind where the folder has none."""
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    mean, std = PIXELS[kind]
    return tuple(config.get("image_mean", mean)), tuple(config.get("image_std", std))


def _folder_sha256(folder: Path, kind: str) -> str:
    """Of the only safetensors file of a folder, or of the digests of its shards in order; and of the pixels' mean and
    deviation where they are not those of its kind, as they move the features."""
    digests = [sha256_of_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    if (statistics := _pixel_statistics(folder, kind)) != PIXELS[kind]:
        digests.append(json.dumps(statistics))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _locate(spec: str) -> tuple[str, Path]:
    """``emoji``, ``inception``, ``clip`` or ``dinov2``, and where its weights lie."""
    kind, _, location = spec.partition(":")
    if spec == "emoji":
        return "emoji", embedded.features_folder()
    if spec == "inception":
        return "inception", find_weights()
    if kind not in ("inception", "clip", "dinov2") or not location:
        known = (
            "emoji, inception (from the usual folders), inception:FILE, clip:FOLDER (a transformers CLIPModel), "
            "dinov2:FOLDER (a Dinov2Model), module:PACKAGE.MODULE:FUNCTION (one's own)"
        )
        near = did_you_mean(kind, ("emoji", "inception", "clip", "dinov2", "module"))
        raise UserError(f"features {spec!r} are not known {near}; there are {known}")
    path = Path(location).expanduser()
    if kind == "inception":
        if not path.is_file():
            raise MissingWeights(
                f"features {spec!r}: no file {path}; give pt_inception-2015-12-05-6726825d.pth (pytorch-fid's and "
                "torch-fidelity's) or inception-2015-12-05.pt (clean-fid's)"
            )
        return kind, path
    if (path / "config.json").is_file():
        return kind, path
    model = {"clip": "CLIPModel", "dinov2": "Dinov2Model"}[kind]
    if path.exists() or location.count("/") != 1:
        problem = f"features {spec!r}: {path} is not a transformers {model} folder (no config.json)"
        raise UserError(problem) if path.exists() else MissingWeights(problem)
    return kind, _from_hub(spec, location, model)


def _from_hub(spec: str, identifier: str, model: str) -> Path:
    """The folder of a hub id in the hub's cache, downloaded where the hub may be asked."""
    found = _hub_folder(identifier)
    if isinstance(found, Path):
        return found
    raise MissingWeights(
        f"features {spec!r}: no folder {identifier}, and no such model in the hub's cache or to be had "
        f"({found}); give the folder of a transformers {model}"
    )


@cache
def _hub_folder(identifier: str) -> Path | str:
    """The folder, or the name of the error: a hub that cannot be reached is asked once, as it takes long to say so."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(identifier, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        return type(error).__name__


@cache
def _load(spec: str, resize: str, device: torch.device) -> FeatureNetwork:
    if spec.startswith("module:"):
        return user_network(spec, resize, device)
    kind, path = _locate(spec)
    if kind == "inception":
        return InceptionFeatures(path, sha256=sha256_of_file(path), mode=resize, device=device)
    mean, std = _pixel_statistics(path, kind)
    sha256 = _folder_sha256(path, kind)
    if kind == "emoji":
        return ClipFeatures(
            path,
            embedded.tokenizer_folder(),
            name="emoji",
            sha256=sha256,
            fd_name="FD-emoji",
            fd_scale=100.0,
            clip_name="CLIP-emoji",
            mean=mean,
            std=std,
            device=device,
        )
    if kind == "dinov2":
        return DinoFeatures(path, name=spec, sha256=sha256, mean=mean, std=std, device=device)
    return ClipFeatures(
        path,
        path,
        name=spec,
        sha256=sha256,
        fd_name=f"FD-CLIP ({path.name})",
        fd_scale=1.0,
        clip_name=f"CLIP score ({path.name})",
        mean=mean,
        std=std,
        device=device,
    )
