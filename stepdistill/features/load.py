"""Feature networks of the evaluation: images (and texts) in, features out, on the machine's own files only.

A network is named by a specification:

    emoji             embedded
    judge             embedded, another network of another kind, which no loss looks through unless a recipe says so
    inception         FID's Inception, from the folders where the FID tools keep it
    inception:FILE    the same from a file: a state dict or clean-fid's TorchScript
    clip:FOLDER       a transformers CLIPModel with its tokenizer, or a hub id: clip:openai/clip-vit-base-patch32
    dinov2:FOLDER     a transformers Dinov2Model, or a hub id: dinov2:facebook/dinov2-large
    module:NAME       one's own: the function NAME, as package.module:function, makes it (see own_module.py)

Every network states how it resizes and the SHA-256 of its weights: a score without them says nothing.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import torch

from stepdistill.errors import MissingWeights, UserError, did_you_mean
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.dino import DinoFeatures
from stepdistill.features.inception import InceptionFeatures, check_public, find_weights
from stepdistill.features.judge import WEIGHTS, Judge
from stepdistill.features.network import FeatureNetwork, Precision
from stepdistill.features.own_module import user_network
from stepdistill.system import emoji as embedded
from stepdistill.system.files import sha256_of
from stepdistill.system.log import quiet_loading
from stepdistill.system.parsing import parse_json


def load_features(
    spec: str,
    *,
    resize: str = "clean",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """The network a specification names; loaded once per process.

    Args:
        spec: see the head of this module.
        resize: ``clean``, for Inception also ``tf1`` and ``pytorch``.
        precision: of the network that looks at images.
        device: where it runs.

    Raises:
        UserError: the specification is unknown, its file is missing, or it has no such precision.
    """
    return _load(spec, resize, precision, torch.device(device))


def check_weights(spec: str) -> None:
    """The weights of the network that a specification names are here; nothing of them is read.

    Raises:
        UserError: the specification is unknown, or its file is missing.
    """
    if spec.startswith("module:"):
        load_features(spec)
    else:
        _locate(spec)


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
    sha256 = sha256_of(path)
    check_public(path, sha256)
    return sha256


PIXELS = {
    **dict.fromkeys(("emoji", "judge"), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of the pixels in [0, 1] that the networks of a kind are used to."""


def _pixel_statistics(folder: Path, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of preprocessor_config.json; those of its kind where the folder has none."""
    file = folder / "preprocessor_config.json"
    config = parse_json(file.read_text("utf-8")) if file.is_file() else {}
    mean, std = PIXELS[kind]
    return tuple(config.get("image_mean", mean)), tuple(config.get("image_std", std))


def _folder_sha256(folder: Path, kind: str) -> str:
    """Of the only safetensors file of a folder, or of the digests of its shards in order; and of the pixels' mean and
    deviation where they are not those of its kind, as they move the features."""
    digests = [sha256_of(shard) for shard in sorted(folder.glob("*.safetensors"))]
    if (statistics := _pixel_statistics(folder, kind)) != PIXELS[kind]:
        digests.append(json.dumps(statistics))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _locate(spec: str) -> tuple[str, Path]:
    """``emoji``, ``judge``, ``inception``, ``clip`` or ``dinov2``, and where its weights lie."""
    kind, _, location = spec.partition(":")
    if spec == "emoji":
        return "emoji", embedded.features_folder()
    if spec == "judge":
        return "judge", embedded.judge_folder()
    if spec == "inception":
        return "inception", find_weights()
    if kind not in ("inception", "clip", "dinov2") or not location:
        known = (
            "emoji, judge, inception (from the usual folders), inception:FILE, clip:FOLDER (a transformers CLIPModel), "
            "dinov2:FOLDER (a Dinov2Model), module:PACKAGE.MODULE:FUNCTION (one's own)"
        )
        near = did_you_mean(kind, ("emoji", "judge", "inception", "clip", "dinov2", "module"))
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
def _load(spec: str, resize: str, precision: Precision, device: torch.device) -> FeatureNetwork:
    if spec.startswith("module:"):
        if precision != "float32":
            raise UserError(
                f"features {spec!r} are your own: {precision} is what their function makes of them"
            )
        return user_network(spec, resize, device)
    kind, path = _locate(spec)
    if kind == "inception":
        return InceptionFeatures(
            path, sha256=sha256_of(path), mode=resize, precision=precision, device=device
        )
    if kind == "judge":
        return Judge(path / WEIGHTS, precision=precision, device=device)
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
            precision=precision,
            device=device,
        )
    if kind == "dinov2":
        return DinoFeatures(
            path, name=spec, sha256=sha256, mean=mean, std=std, precision=precision, device=device
        )
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
        precision=precision,
        device=device,
    )


def network_of(
    features: str,
    resize: str,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
) -> FeatureNetwork:
    """The network, which must have the resize mode: one that has only another would make other statistics than asked.

    Args:
        features: its specification, as a suite writes it.
        resize: ``clean`` or another mode of the network.
        device: None is CUDA if there is one.
        precision: of the network that looks at images.

    Raises:
        UserError: the network is unknown, its file is missing, or it has no such mode or precision.
    """
    quiet_loading()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = load_features(features, resize=resize, precision=precision, device=device)
    if mode_of(network.resize) != resize:
        raise UserError(f"features {features} have no resize {resize!r}; they have {network.resize!r}")
    return network


def mode_of(resize: str) -> str:
    """The mode in a network's words: ``clean`` of ``clean (bicubic, antialiased, float) to 32``."""
    return resize.split()[0] if resize.split() else ""
