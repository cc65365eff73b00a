"""Guiders: parts of some pipelines that say how often a step calls the network, and mix what it says."""

from __future__ import annotations

import copy
from typing import Any

from stepdistill.families.watching import quietly


def is_guider(part: Any) -> bool:
    """Whether a component is a guider: a student's is its own, and switched off."""
    from diffusers.guiders.guider_utils import BaseGuidance

    return isinstance(part, BaseGuidance)


def guiders_of(pipe: Any) -> dict[str, Any]:
    """A pipeline's guiders, by name."""
    return {name: part for name, part in pipe.components.items() if is_guider(part)}


def switched_off(pipe: Any) -> dict[str, Any]:
    """Copies of them that hand on what the network says."""
    with quietly():  # each says that it is an experiment of diffusers'
        return {name: guider.new(enabled=False) for name, guider in guiders_of(pipe).items()}


def guided_at(pipe: Any, scale: float | None) -> Any:
    """A pipeline whose guiders, each as it is otherwise, are at a scale, or off where that is None; itself where it has
    none."""
    if not (own := guiders_of(pipe)):
        return pipe
    told: dict[str, Any] = {"enabled": False} if scale is None else {"guidance_scale": scale}
    guided = copy.copy(pipe)
    with quietly():
        guided.register_modules(**{name: guider.new(**told) for name, guider in own.items()})
    return guided


def guided_plainly(pipe: Any, scale: float) -> tuple[Any, str]:
    """A pipeline whose guiders are plain guidance of a scale, and in words what that leaves out of its own."""
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

    own = guiders_of(pipe)
    if not own:
        return pipe, ""
    guided = copy.copy(pipe)
    with quietly():
        guided.register_modules(**{name: ClassifierFreeGuidance(scale) for name in own})
    other = sorted({type(guider).__name__ for guider in own.values()} - {ClassifierFreeGuidance.__name__})
    return guided, f" (plainly, not as its {', '.join(other)})" if other else ""
