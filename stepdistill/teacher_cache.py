"""Scores of teachers that were computed before: shipped ones first, then a folder of the user's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.checks import find_pipeline
from stepdistill.content import cache_folder, content_folder
from stepdistill.features import sha256_of_file
from stepdistill.pipeline_files import INDEX, SAFETY_CHECKER
from stepdistill.suite import Suite

SHIPPED = "teachers.json"
NEWEST = "coverage"
"""The metric that suites compute and that was added last."""


@dataclass(frozen=True)
class Entry:
    """A cached score.

    Attributes:
        scores: the fields of StepScores.
        source: ``shipped`` or ``user``.
    """

    scores: dict[str, Any]
    source: str


def weights_hash(pipeline: Any) -> str:
    """SHA-256 of a pipeline's weights and configs.

    A safety checker does not count, as it is off. For a folder, of the safetensors and JSON files and tokenizer texts
    of its components in the order of their names; names of writers and versions inside a config do not count. For an
    object, of its configs and of its tensors with names, dtypes and shapes, so a changed weight or scheduler changes
    it.

    Raises:
        UserError: the path holds no pipeline.
    """
    digest = hashlib.sha256()
    if not isinstance(pipeline, (str, Path)):
        from torch import nn

        for name, component in sorted(pipeline.components.items()):
            if name == SAFETY_CHECKER:
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
                for key, value in sorted(component.state_dict().items()):
                    digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}\n".encode())
                    digest.update(_bytes(value))
        return digest.hexdigest()
    folder = find_pipeline(pipeline)
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    for name, file in sorted(named.items()):
        if name.count("/") > 1 or (name.count("/") == 0 and name != INDEX):
            continue
        if name.startswith(f"{SAFETY_CHECKER}/"):
            continue
        if file.suffix == ".safetensors" or file.name == "merges.txt":
            digest.update(f"{name} {sha256_of_file(file)}\n".encode())
        elif file.suffix == ".json":
            digest.update(f"{name} {_plain(json.loads(file.read_text('utf-8')))}\n".encode())
    return digest.hexdigest()


def key(weights: str, suite: Suite, steps: int, guidance: float) -> str:
    """The name of a score: it changes with anything that can move it."""
    content = [weights, suite.label, suite.sha256(), steps, float(guidance)]
    if suite.diversity:  # a score of its own, apart from the suite's hash
        content += [suite.diversity, suite.diversity_prompts]
    if suite.intervals:  # an error of its own, apart as well
        content.append("intervals")
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def find(name: str) -> Entry | None:
    """The cached score of a key, or None. A file of the user's cache that cannot be read counts as absent, and so
    does a score from before a metric of the suites' was there."""
    shipped = content_folder("eval") / "reference" / SHIPPED
    if shipped.is_file():
        entries = json.loads(shipped.read_text("utf-8"))
        if name in entries and NEWEST in entries[name]["scores"]:
            return Entry(entries[name]["scores"], "shipped")
    file = cache_folder() / "teachers" / f"{name}.json"
    try:
        scores = json.loads(file.read_text("utf-8"))["scores"]
    except (OSError, ValueError, KeyError):
        return None
    return Entry(scores, "user") if NEWEST in scores else None


def store(name: str, content: dict[str, Any]) -> None:
    """Put a score into the user's cache; a cache that cannot be written is passed over, the score is not lost."""
    file = cache_folder() / "teachers" / f"{name}.json"
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(file)


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
