"""Rewards by name: from a recipe's ``terms.reward`` to functions of pictures and prompt numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.judge import load_judge
from stepdistill.features.load import load_features
from stepdistill.losses.rewards import Reward
from stepdistill.metrics.colours import NOUNS, hue_share, hues_of, ink
from stepdistill.pictures.given import words_of
from stepdistill.recipes.rewards import own_reward, reward_kind
from stepdistill.system.python_files import module_of

KEPT = 65536
"""Prompts whose features are held."""


class PromptFeatures:
    """Text features of a run's prompts; those of up to KEPT are kept once they were asked for.

    Args:
        network: whose.
        prompts: the run's.
    """

    def __init__(self, network: ClipFeatures, prompts: Sequence[str]) -> None:
        self.network, self.prompts = network, prompts
        self._texts: dict[int, Tensor] = {}

    def __call__(self, prompt: Tensor) -> Tensor:
        """Unit features [B, D] of the prompts [B]."""
        numbers = prompt.tolist()
        if missing := sorted(set(numbers) - self._texts.keys()):
            if len(self._texts) + len(missing) > KEPT:
                self._texts.clear()
                missing = sorted(set(numbers))
            features = self.network.texts(words_of(self.prompts[i] for i in missing))
            self._texts.update(zip(missing, features, strict=True))
        return torch.stack([self._texts[i] for i in numbers])


class ClipReward:
    """The cosine between the features of a picture and those of its own prompt, in [-1, 1].

    Args:
        network: a CLIP model.
        prompts: the run's.
    """

    def __init__(self, network: ClipFeatures, prompts: Sequence[str]) -> None:
        self.network, self.texts = network, PromptFeatures(network, prompts)

    def __call__(self, images: Tensor, prompt: Tensor) -> Tensor:
        return (self.network.embed(255 * images) * self.texts(prompt).to(images.device)).sum(1)


class CaptionReward:
    """A function of pictures [B, 3, H, W] in [0, 1] and their captions, to [B]: the judge's, or the user's own.

    Args:
        fit: that function.
        name: of it, for messages.
        prompts: the run's.
    """

    def __init__(self, fit: Callable[[Tensor, list[str]], Tensor], name: str, prompts: Sequence[str]) -> None:
        self.fit, self.name, self.prompts = fit, name, prompts

    def __call__(self, images: Tensor, prompt: Tensor) -> Tensor:
        found: Any = self.fit(images, words_of(self.prompts[i] for i in prompt.tolist()))
        if not isinstance(found, Tensor) or found.shape != (len(images),):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"terms.reward: {self.name} gave {shape} for {len(images)} pictures, not one each"
            )
        if images.requires_grad and not found.requires_grad:
            raise UserError(
                f"terms.reward: {self.name} has no gradient in the pictures: compute with torch, without no_grad, item "
                "or numpy"
            )
        return found


class ColourReward:
    """The share of a picture's ink that has the hue its caption names; 0 for a caption that names none.

    Args:
        prompts: the run's.
        device: where pictures lie.
    """

    def __init__(self, prompts: Sequence[str], device: torch.device) -> None:
        self.hues = hues_of(words_of(prompts))
        if bool(self.hues.isnan().all()):
            raise UserError(
                "terms.reward is colour, but no prompt names a hue of a thing of one colour, such as 'red heart' "
                f"(things: {', '.join(NOUNS)}): give such in data.prompts"
            )
        self.hues = self.hues.to(device)

    def __call__(self, images: Tensor, prompt: Tensor) -> Tensor:
        hue = self.hues[prompt.to(self.hues.device)]
        named = ~hue.isnan()
        return torch.where(named, hue_share(images, hue.nan_to_num()), 0 * images.sum(dim=(1, 2, 3)))


class InkReward:
    """The share of a picture that is not white, or less its squared distance from a target.

    Args:
        target: None has the share itself rise.
    """

    def __init__(self, target: float | None) -> None:
        self.target = target

    def __call__(self, images: Tensor, prompt: Tensor) -> Tensor:
        share = ink(images)
        return share if self.target is None else -(share - self.target).square()


def network_of_reward(name: str, device: torch.device) -> ClipFeatures:
    """The CLIP network of ``clip:NAME``."""
    spec = "emoji" if name == "clip:emoji" else name
    return cast(ClipFeatures, load_features(spec, device=device))


def _clip(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    return ClipReward(network_of_reward(name, device), prompts)


def _judge(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    return CaptionReward(load_judge(device).fit, name, prompts)


def _colour(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    return ColourReward(prompts, device)


def _ink(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    return InkReward(float(target) if (target := name.partition(":")[2]) else None)


def _module(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    place, _, function = name.removeprefix("module:").rpartition(":")
    try:
        found = getattr(importlib.import_module(place), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"terms.reward {name!r}: {error}; give module:PACKAGE.MODULE:FUNCTION of a module that Python finds"
        ) from None
    return CaptionReward(found, name, prompts)


def _file(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    own = own_reward(name)
    assert own is not None
    module = module_of(str(own.file), "reward")
    found = getattr(module, own.function, None)
    if not callable(found):
        raise UserError(f"terms.reward {name!r}: the file has no function {own.function}")
    return CaptionReward(found, name, prompts)


REWARDS: dict[str, Callable[[str, torch.device, Sequence[str]], Reward]] = {
    "clip": _clip,
    "judge": _judge,
    "colour": _colour,
    "ink": _ink,
    "module": _module,
    "file": _file,
}
"""By kind: what makes one of its whole name, a device and the run's prompts."""


def make_reward(name: str, device: torch.device, prompts: Sequence[str]) -> Reward:
    """The reward of a recipe's name.

    Raises:
        UserError: its network or function is missing, or the prompts do not suit it.
    """
    return REWARDS[reward_kind(name)](name, device, prompts)
