"""SHA-256 of a pipeline's weights and configs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.networks.find import find_pipeline
from stepdistill.networks.pipeline_files import ADAPTER, INDEX, LORA, SAFETY_CHECKER
from stepdistill.system.files import sha256_of
from stepdistill.system.parsing import parse_json

if TYPE_CHECKING:
    from torch import nn


def weights_hash(pipeline: Any, without: Callable[[str], bool] = lambda component: False) -> str:
    """SHA-256 of a pipeline's weights and configs.

    A safety checker does not count, as it is off. For a folder, of the safetensors and JSON files and tokenizer texts
    of its components in the order of their names; names of writers and versions inside a config do not count. For an
    object, of its configs and of its tensors with names, dtypes and shapes, so a changed weight or scheduler changes
    it.

    Args:
        pipeline: a folder, or an object.
        without: which components of an object do not count.

    Raises:
        UserError: the path holds no pipeline.
    """
    digest = hashlib.sha256()
    if not isinstance(pipeline, (str, Path)):
        from torch import nn

        for name, component in sorted(pipeline.components.items()):
            if name == SAFETY_CHECKER or without(name):
                continue
            config = getattr(component, "config", None)
            if config is not None:
                content = (
                    config.to_dict()
                    if isinstance(component, nn.Module) and not isinstance(config, dict)
                    else config
                )
                digest.update(f"{name} {_plain(dict(content))}\n".encode())
            if isinstance(component, nn.Module):
                _add(digest, name, component)
        return digest.hexdigest()
    folder = find_pipeline(pipeline)
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    alone = {ADAPTER, LORA} if ADAPTER in named else set()
    for name, file in sorted(named.items()):
        if name.count("/") > 1 or (name.count("/") == 0 and name != INDEX and name not in alone):
            continue
        if name.startswith(f"{SAFETY_CHECKER}/"):
            continue
        if file.suffix == ".safetensors" or file.name == "merges.txt":
            digest.update(f"{name} {sha256_of(file)}\n".encode())
        elif file.suffix == ".json":
            digest.update(f"{name} {_plain(parse_json(file.read_text('utf-8')))}\n".encode())
    return digest.hexdigest()


def networks_hash(networks: Sequence[nn.Module]) -> str:
    """SHA-256 of the tensors of networks with names, dtypes and shapes."""
    digest = hashlib.sha256()
    for number, network in enumerate(networks):
        _add(digest, str(number), network)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, network: nn.Module) -> None:
    from stepdistill.networks.quantized import plain_tensors

    for key, value in sorted(plain_tensors(network.state_dict()).items()):
        digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))


def _plain(config: dict[str, Any]) -> str:
    """A config without what its writer says of itself (_name_or_path, versions), keys in order."""
    bookkeeping = re.compile(r"^_(?!class_name$)|^transformers_version$")
    return json.dumps(
        {k: v for k, v in config.items() if not bookkeeping.search(k)}, sort_keys=True, default=str
    )


def _bytes(value: Any) -> bytes:
    import torch

    flat = value.detach().cpu().contiguous().reshape(-1)
    data: bytes = flat.view(torch.uint8).numpy().tobytes()
    return data
