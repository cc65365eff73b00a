"""Checkpoints: safetensors and one JSON, hashed, written under a temporary name and renamed, the last few kept.

``checkpoints/step-00000100/`` holds ``<name>.safetensors`` for every group of tensors and ``state.json``, which lists
the files with their SHA-256. Of networks in parts every process writes its own, ``<name>-00001-of-00002.safetensors``,
and any number of processes reads them. A folder without a valid ``state.json`` is no checkpoint; a listed file that is
missing or whose hash differs is an error that names it, never a silent restart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.networks.sharding import held_like
from stepdistill.system.files import folder_written_whole, remove_folder, sha256_of
from stepdistill.system.inside import is_inside
from stepdistill.system.parsing import parse_json
from stepdistill.system.processes import ALONE, Processes
from stepdistill.training.sharded_files import Like, group_of, read_parts, write_parts

STATE = "state.json"
OWN_HASH = "sha256"
"""In it: of all that it says besides. Those of earlier versions have none."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's ``checkpoints`` folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def folder_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    sharers: Processes = ALONE,
) -> Path:
    """Writes one checkpoint and removes all but the last ``keep``.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: updates done.
        tensors: groups of tensors, one file each, or one of every sharer.
        state: what else there is to remember, JSON.
        keep: how many checkpoints stay, at least 1.
        sharers: the processes that hold parts of the tensors; all of them call it.

    Raises:
        UserError: when it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    final = folder / folder_of(step)
    try:
        with folder_written_whole(final, sharers) as partial:
            written: list[Path] = []
            if sharers.count > 1:
                written += write_parts(partial, {name: group for name, group in tensors.items() if group})
            for name, group in tensors.items() if sharers.main else ():
                if not group or sharers.count == 1:
                    written.append(partial / f"{name}.safetensors")
                    whole = {key: value.detach().contiguous().cpu() for key, value in group.items()}
                    save_file(whole, written[-1])
            own = sharers.together(lambda: {file.name: sha256_of(file) for file in written})
            files = {name: file_hash for each in sharers.gather(own) for name, file_hash in each.items()}
            sharers.together(
                lambda: _write_state(partial, {**state, "step": step, "files": files}, sharers.main)
            )
    except (OSError, SafetensorError) as error:
        kept = checkpoints_in(folder)
        last = f"the last good one is {kept[-1]}" if kept else "there is no earlier one"
        raise UserError(
            f"checkpoint {final} could not be written ({error}); {last}. Free space and use --resume"
        ) from error
    for old in checkpoints_in(folder)[:-keep] if sharers.main else ():
        remove_folder(old)
    return final


def _write_state(partial: Path, state: Mapping[str, Any], main: bool) -> None:
    """Lists the files, where the main process sees all of them."""
    if not main:
        return
    if missing := [name for name in state["files"] if not (partial / name).is_file()]:
        raise OSError(f"{missing[0]} is not seen by process 0: the run folder must be one for all machines")
    (partial / STATE).write_text(json.dumps({**state, OWN_HASH: _hash_of(state)}, indent=1))


def _hash_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        state: dict[str, Any] = parse_json((path / STATE).read_text())
        if state.pop(OWN_HASH, None) not in (None, _hash_of(state)):
            raise ValueError("it is not what was written")
        files = {str(name): str(sha256) for name, sha256 in state["files"].items()}
        if outside := [name for name in files if not is_inside(name) or "/" in name]:
            raise ValueError(f"files has {outside[0]}, which is no file of the folder")
        return {**state, "files": files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {path} has no readable {STATE} ({error}): delete that folder to resume from the one before it"
        ) from error


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors in full and the state of a checkpoint, after its files' hashes were checked.

    Raises:
        UserError: for a missing or altered file, naming it.
    """
    state = read_state(path)
    check_files(path, state)
    return {name: load_group(path, files) for name, files in groups_of(state).items()}, state


def check_files(path: Path, state: Mapping[str, Any], reader: Processes = ALONE) -> None:
    """Checks the files of a checkpoint, or of several readers its share of them.

    Raises:
        UserError: for a missing or altered file, naming it.
    """
    for name, expected in list(state["files"].items())[reader.rank :: reader.count]:
        file = path / name
        if not file.is_file():
            raise UserError(
                f"checkpoint {path} lacks {name}: delete that folder to resume from the one before it"
            )
        if sha256_of(file) != expected:
            raise UserError(
                f"checkpoint {path} is damaged: {name} has not the SHA-256 that {STATE} states. Delete that folder to "
                "resume from the one before it"
            )


def groups_of(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """The files of each group of tensors, by its name."""
    found: dict[str, list[str]] = {}
    for name in state["files"]:
        found.setdefault(group_of(name), []).append(name)
    return found


def load_group(path: Path, files: Sequence[str], like: Like | None = None) -> dict[str, Tensor]:
    """A group's tensors: in full, or in parts as ``like`` says, where all processes call it."""
    found = [path / name for name in files]
    try:
        if like is None and found[0].stem == group_of(files[0]):
            return load_file(found[0])
        return read_parts(found, like or (lambda name, shape: None), together=like is not None)
    except (SafetensorError, KeyError) as error:  # of a file whose hash is in order, which another wrote
        raise UserError(
            f"checkpoint {path} is damaged: {files[0]} is no file of tensors ({error}). Delete that folder to resume "
            "from the one before it"
        ) from None


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors, ``NUMBER.KEY``."""
    named: dict[str, Any] = {}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            # bitsandbytes puts what is in eight bits into a dictionary of its own, with one table of codes for all.
            own = value if isinstance(value, dict) else {key: value}
            named |= {f"{i}.{k}": v.clone() if k.startswith("qmap") else v for k, v in own.items()}
    # Some count steps in a Python number.
    return {name: torch.as_tensor(value) for name, value in named.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts such tensors, in full, back into an optimiser over the same parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor | int]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if key == "step" and not value.is_floating_point():  # it was a Python number
            states.setdefault(int(index), {})[key] = int(value)
            continue
        like = parameters[int(index)]
        of_weights = value.shape == like.shape and key != "step"
        moment = _laid_out_like(held_like(value, like), like) if of_weights else value
        states.setdefault(int(index), {})[key] = moment
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(value: Tensor, weight: Tensor) -> Tensor:
    """A moment whose numbers lie in memory as the weight's do: a fused update goes by that. Files know one order, and
    weights may have another, channels last."""
    return (
        value
        if value.stride() == weight.stride()
        else torch.empty_like(weight, dtype=value.dtype).copy_(value)
    )
