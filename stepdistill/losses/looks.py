"""What image networks see of a run's samples, for methods that align, judge or select pictures by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Eye:
    """A frozen image network.

    Attributes:
        embed: pictures [B, 3, H, W] in [0, 1] to features [B, D], with a graph.
        dimension: D.
    """

    embed: Callable[[Tensor], Tensor]
    dimension: int


@dataclass(frozen=True)
class Looks:
    """Pictures of clean latents, and what networks see in them.

    Attributes:
        decode: clean latents [B, ...] to pictures [B, 3, H, W] in [0, 1], with a graph.
        eyes: by their specification, see features/load.py; the first is the one that likeness is measured in.
    """

    decode: Callable[[Tensor], Tensor]
    eyes: Mapping[str, Eye]

    @property
    def first(self) -> Eye:
        """The network that likeness is measured in."""
        return next(iter(self.eyes.values()))
