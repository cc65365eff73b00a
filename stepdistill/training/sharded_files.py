"""Tensors of which every process holds a part, in safetensors files of which it writes one.

``torch.distributed.checkpoint`` does it with its storage of safetensors, which keeps each part's place in the header of
its file. That package's default storage has an index that is unpickled when it is read; this one has none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Like = Callable[[str, torch.Size], Tensor | None]
"""Says by a stored tensor's name and shape which tensor it will be held like; None is in full."""

_NAME = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors$")


def write_parts(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Writes the parts that this process holds; all processes call it together, with the same names.

    Args:
        folder: where to.
        groups: tensors by a group's name and their own; what is no DTensor is the same in all processes, and one of
            them writes it. One group after the other is on the CPU.

    Returns:
        The files that this process wrote, at most one for each group: ``GROUP-00001-of-00002.safetensors``.

    Raises:
        OSError: a process could not write, in all of them.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    number, count = torch.distributed.get_rank() + 1, torch.distributed.get_world_size()
    tensors = {f"{group}/{name}": v.detach() for group, own in groups.items() for name, v in own.items()}
    place = {group: i for i, group in enumerate(groups, 1)}
    places = {name: place[name.partition("/")[0]] for name in tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:  # no Exception, and many lines long
        rank, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {first}") from error
    written = []
    for group, i in place.items():
        for file in folder.glob(f"shard-{number:05d}-model-{i:05d}-of-*.safetensors"):
            written.append(file.rename(folder / f"{group}-{number:05d}-of-{count:05d}.safetensors"))
    return written


def group_of(file: str) -> str:
    """The group whose tensors a file holds, all of them or a part of each."""
    return _NAME.sub("", file)


def read_parts(files: Sequence[Path], like: Like, *, together: bool) -> dict[str, Tensor]:
    """Reads a group's tensors: of each what this process is to hold, and no more.

    Args:
        files: all that :func:`write_parts` made of the group in all processes, or one ordinary safetensors file.
        like: how each tensor is to be held.
        together: whether all processes call it, and may hold parts.
    """
    from torch.distributed.checkpoint.filesystem import FileSystem
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    names, group = sorted(str(file) for file in files), f"{group_of(files[0].name)}/"

    class These(FileSystem):
        """Lists the files that belong together, whatever else lies beside them."""

        def ls(self, path: Any) -> list[str]:
            return names

    reader = HuggingFaceStorageReader(str(Path(names[0]).parent))
    reader.fs = These()
    found: dict[str, Tensor] = {}
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(meta, TensorStorageMetadata)  # safetensors holds nothing else
        held, kind = like(name.removeprefix(group), meta.size), meta.properties.dtype
        if isinstance(held, DTensor):
            found[name] = torch.empty_like(held.detach(), dtype=kind)
        else:
            found[name] = torch.empty(meta.size, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        load(found, storage_reader=reader, no_dist=not together)
    return {name.removeprefix(group): value for name, value in found.items()}
