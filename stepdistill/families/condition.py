"""What a network is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.system.memory import sent

GUIDANCE = "guidance"
"""The condition that holds the guidance scale itself [B], for a network that takes it as an input."""

GAP = "gap"
"""The condition that tells a network with a second time of its jump: t - s [B], in [0, 1], or for late blocks the
network's own time at s."""

MASK = "mask"
"""What the name of a mask ends with: [B, L], 0 or false where a sequence is padding."""


@dataclass(frozen=True)
class Condition:
    """What a network is conditioned on: named tensors, each [B, ...]; empty for an unconditional network.

    Prompts of several lengths are padded sequences [B, L, ...] with a mask [B, L] beside them, see :func:`joined`.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, None where there is none."""
        return self.tensors.get(name)

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of the chosen samples."""
        return Condition({name: value[index] for name, value in self.tensors.items()})

    def repeat(self, count: int) -> Condition:
        """One condition (B = 1) for ``count`` samples."""
        return Condition({k: v.expand(count, *v.shape[1:]) for k, v in self.tensors.items()})

    def join(self, other: Condition) -> Condition:
        """The samples of both, in order."""
        return joined([self, other])

    def with_tensor(self, name: str, value: Tensor) -> Condition:
        """The same condition with one more tensor [B, ...]."""
        return Condition({**self.tensors, name: value})

    def to(self, device: torch.device) -> Condition:
        """The same condition on another device."""
        return Condition({name: sent(value, device) for name, value in self.tensors.items()})


def joined(conditions: Sequence[Condition]) -> Condition:
    """The samples of all, in order. Sequences [B, L, ...] of different L are padded with zeros to the longest, as far
    as a mask says where each ends.

    Raises:
        ValueError: for sequences of different lengths in a condition that has no mask: padding would be read as text.
    """
    return Condition({name: _joined(name, conditions) for name in conditions[0].tensors})


def _joined(name: str, conditions: Sequence[Condition]) -> Tensor:
    values = [condition[name] for condition in conditions]
    if len({value.shape[1:] for value in values}) > 1:
        if not any(other.endswith(MASK) for other in conditions[0].tensors):
            shapes = " and ".join(sorted({str(tuple(value.shape[1:])) for value in values}))
            raise ValueError(f"conditions '{name}' of {shapes} have no mask that says where each ends")
        longest = max(value.shape[1] for value in values)
        values = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, longest - v.shape[1])) for v in values]
    return torch.cat(values)
