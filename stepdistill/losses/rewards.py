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

    def gradients(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """The gradient of each reward in each of the latents, [M, B, ...]; no graph is left."""
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            return _gradients(self.scores(leaf, prompt), leaf)

    def seen(self, x0: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [M, B], and how much each pixel matters to them, |gradient| over the colours, [M, B, H, W]; no graph
        is left."""
        with torch.no_grad():
            images = self.decode(x0)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            scores = torch.stack([reward(leaf, prompt) for reward in self.each])
            gradients = _gradients(scores, leaf)
        return scores.detach(), gradients.abs().mean(2)

    def total(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """Their sum, [B]."""
        return self.scores(x0, prompt).sum(0)


def _gradients(scores: Tensor, leaf: Tensor) -> Tensor:
    """Of scores [M, B] in what they are of, [M, B, ...]."""
    found = [torch.autograd.grad(each.sum(), leaf, retain_graph=True)[0] for each in scores]
    return torch.stack(found)
