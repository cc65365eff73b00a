"""What a pipeline's own call is told of prompts: their text, and the pictures that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.families import known_family
from stepdistill.families.size import Size
from stepdistill.pictures.given import any_named, check_named

OF_PICTURE = ("prompt", "image", "height", "width", "max_area", "_auto_resize")
"""Arguments that say what is drawn from, and at what size."""


def check_asked(pipe: Any, prompts: Sequence[str]) -> None:
    """Prompts name pictures as the pipeline takes them.

    Raises:
        UserError: one names none, and the pipeline draws from one; or the other way round.
    """
    name = type(pipe).__name__
    if (family := known_family(name)) is None:
        check_named(prompts, False, name, "prompts")
    else:
        family.check_prompts(name, prompts, "prompts")


def asked_of(pipe: Any, prompts: Sequence[str], told: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that prompts stand for; the size with them, where the picture must be of that too.

    Args:
        pipe: the pipeline; its call takes prompts.
        prompts: the prompts.
        told: what else its call is told.

    Raises:
        UserError: see :func:`check_asked`.
    """
    check_asked(pipe, prompts)
    family = known_family(type(pipe).__name__)
    if family is None or not any_named(prompts):
        return {"prompt": list(prompts)}
    size = family.default_size(pipe)
    if told.get("height") and told.get("width"):
        size = Size(int(told["height"]), int(told["width"]), size.frames)
    call = family.call_arguments(type(pipe).__name__, list(prompts), None, size)
    return {name: value for name, value in call.items() if name in OF_PICTURE}
