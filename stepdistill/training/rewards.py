"""Rewards by name: from a recipe's ``terms.reward`` to a function of clean latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from stepdistill.features.clip import ClipFeatures
from stepdistill.features.load import load_features
from stepdistill.losses.rewards import Reward

KEPT = 65536
"""Prompts whose features are held."""


class ClipReward:
    """The cosine between the features of a sample's image and those of its own prompt, in [-1, 1].

    Args:
        network: a CLIP model; the features of up to KEPT prompts are kept once they were asked for.
        decode: latents [B, ...] to images [B, 3, H, W] in [0, 1], with a graph.
        prompts: the run's.
    """

    def __init__(
        self, network: ClipFeatures, decode: Callable[[Tensor], Tensor], prompts: Sequence[str]
    ) -> None:
        self.network, self.decode, self.prompts = network, decode, prompts
        self._texts: dict[int, Tensor] = {}

    def __call__(self, x0: Tensor, prompt: Tensor) -> Tensor:
        numbers = prompt.tolist()
        if missing := sorted(set(numbers) - self._texts.keys()):
            if len(self._texts) + len(missing) > KEPT:
                self._texts.clear()
                missing = sorted(set(numbers))
            features = self.network.texts([self.prompts[i] for i in missing])
            self._texts.update(zip(missing, features, strict=True))
        texts = torch.stack([self._texts[i] for i in numbers]).to(x0.device)  # [B, D]
        return (self.network.embed(255 * self.decode(x0)) * texts).sum(1)


def clip(
    spec: str, device: torch.device, decode: Callable[[Tensor], Tensor], prompts: Sequence[str]
) -> Reward:
    """``emoji`` or ``clip:FOLDER``: see stepdistill/features/load.py."""
    return ClipReward(cast(ClipFeatures, load_features(spec, device=device)), decode, prompts)


REWARDS = {"emoji": clip, "clip": clip}
"""By the part of ``terms.reward`` before a colon: what makes one of the whole name, a device, how latents become images
in [0, 1], and the run's prompts."""
