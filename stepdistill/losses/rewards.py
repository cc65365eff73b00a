"""Rewards: how good pictures are, for terms and methods that climb them.

What climbs a network is scored better by that network than it is: measure with another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """How good pictures are."""

    def __call__(self, images: Tensor, prompt: Tensor) -> Tensor:
        """A number for each picture, [B], higher is better, with a graph into it alone.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompt: which of the run's prompts each was drawn for, [B], on the processor.
        """
        ...


@dataclass(frozen=True)
class Rewards:
    """What a run's samples are judged by.

    Attributes:
        decode: clean latents [B, ...] to pictures [B, 3, H, W] in [0, 1], with a graph.
        each: rewards, one or more.
    """

    decode: Callable[[Tensor], Tensor]
    each: tuple[Reward, ...]

    def scores(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """What each reward gives clean latents [B, ...], [M, B], with a graph."""
        images = self.decode(x0)
        return torch.stack([reward(images, prompt) for reward in self.each])

    def total(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """Their sum, [B]."""
        return self.scores(x0, prompt).sum(0)
