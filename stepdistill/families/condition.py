"""What a network is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a network is conditioned on: named tensors, each [B, ...]; empty for an unconditional network."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Tensor | slice) -> Condition:
        """The condition of the chosen samples."""
        return Condition({name: value[index] for name, value in self.tensors.items()})

    def repeat(self, count: int) -> Condition:
        """One condition (B = 1) for ``count`` samples."""
        return Condition({k: v.expand(count, *v.shape[1:]) for k, v in self.tensors.items()})

    def join(self, other: Condition) -> Condition:
        """The samples of both, in order."""
        return Condition(
            {name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()}
        )

    def with_tensor(self, name: str, value: Tensor) -> Condition:
        """The same condition with one more tensor [B, ...]."""
        return Condition({**self.tensors, name: value})

    def to(self, device: torch.device) -> Condition:
        """The same condition on another device."""
        return Condition({name: value.to(device) for name, value in self.tensors.items()})
