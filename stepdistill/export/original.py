"""The teacher as it was given, a folder or a pipeline object: what of it a student's folder takes over as it is."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.networks.find import local_folder
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.pipeline_files import largest_shard, take_over, tensor_types

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNBROKEN = 2**62
"""A shard size that nothing reaches."""


class WeightTypes:
    """What the weights of a network are saved in: each as the teacher's of that name, a new one as most of them.

    Args:
        found: the types of the teacher's weights by name; what is not float32, float16 or bfloat16 is passed over.
    """

    def __init__(self, found: Mapping[str, torch.dtype]) -> None:
        self._found = {name: dtype for name, dtype in found.items() if dtype in _TYPES.values()}
        counts = Counter(self._found.values())
        self.most = counts.most_common(1)[0][0] if counts else torch.float32

    def __call__(self, name: str) -> torch.dtype:
        """The type of the weight ``name``; in what holds several networks, as each of them has it."""
        return self._found.get(re.sub(r"^(experts|networks)\.\d+\.", "", name), self.most)

    @property
    def rounds(self) -> bool:
        """Whether a float32 weight loses digits."""
        return any(dtype != torch.float32 for dtype in (self.most, *self._found.values()))


class Original:
    """The teacher as it was given.

    Args:
        source: an embedded name, a folder, a Hub name that was downloaded, or a pipeline object.
        changed: components that are not as they were given.
    """

    def __init__(self, source: Any, changed: Collection[str] = ()) -> None:
        named = isinstance(source, str | Path)
        self.folder = local_folder(source) if named else None
        self._parts: dict[str, Any] = {} if named else source.components
        self._changed = frozenset(changed)

    def types(self, network: str) -> WeightTypes:
        """What the weights of its network are saved in."""
        if self.folder is not None:
            named = tensor_types(self.folder / network).items()
            return WeightTypes({name: _TYPES[kind] for name, kind in named if kind in _TYPES})
        state = self._parts[network].state_dict() if network in self._parts else {}
        return WeightTypes({k.replace(".base_layer.", "."): v.dtype for k, v in state.items()})

    def shard_size(self, network: str) -> int | str:
        """The largest file of its network, in bytes; diffusers' own limit for an object."""
        return (largest_shard(self.folder / network) or UNBROKEN) if self.folder is not None else "10GB"

    def save(self, name: str, part: Any, to: Path) -> None:
        """Writes a component that is the teacher's: its files, or the object as it was handed in.

        Args:
            name: of the component.
            part: it as it was taken: in other types, or with adapters in its weights.
            to: its new folder.
        """
        if name in self._changed:
            self._save_changed(name, part, to)
            return
        if self.folder is not None and (self.folder / name).is_dir():
            take_over(self.folder / name, to)
            return
        given = self._parts.get(name, part)
        adapted = isinstance(given, nn.Module) and bool(lora_layers(given))
        (part if adapted else given).save_pretrained(to)

    def _save_changed(self, name: str, part: Any, to: Path) -> None:
        """Writes a component whose values are those of its types already."""
        with held_in(part, self.types(name)) if isinstance(part, nn.Module) else contextlib.nullcontext():
            part.save_pretrained(to)


def round_to(network: nn.Module, types: WeightTypes) -> None:
    """Gives float32 weights the values that they have in these types, in place."""
    for name, value in _saved(network):
        value.data.copy_(value.data.to(types(name)))


@contextlib.contextmanager
def held_in(network: nn.Module, types: WeightTypes) -> Iterator[None]:
    """Inside the ``with`` a network that :func:`round_to` rounded is held in these types, tensor by tensor; after it in
    float32 again, with the same values."""
    saved = _saved(network)
    try:
        for name, value in saved:
            value.data = value.data.to(types(name))
        yield
    finally:
        for _, value in saved:
            value.data = value.data.float()


@contextlib.contextmanager
def in_float32(pipe: Any, but: frozenset[str] = frozenset()) -> Iterator[None]:
    """Inside the ``with`` all networks of a pipeline, but for those of these names, are held in float32, without
    copies; after it as before."""
    parts = pipe.components.items()
    networks = [part for name, part in parts if isinstance(part, nn.Module) and name not in but]
    tensors = [value for each in networks for value in (*each.parameters(), *each.buffers())]
    low = [(value, value.dtype) for value in tensors if value.dtype in (torch.bfloat16, torch.float16)]
    try:
        for value, _ in low:
            value.data = value.data.float()
        yield
    finally:
        for value, dtype in low:
            value.data = value.data.to(dtype)


def _saved(network: nn.Module) -> list[tuple[str, torch.Tensor]]:
    state = network.state_dict(keep_vars=True)
    return [(name, value) for name, value in state.items() if value.dtype == torch.float32]
