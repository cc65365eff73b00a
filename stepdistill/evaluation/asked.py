"""What a pipeline's own call is told of prompts: their text, and the pictures that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.families import known_family
from stepdistill.families.size import Size
from stepdistill.pictures.given import check_named, pictures_of, words_of


def asked_of(pipe: Any, prompts: Sequence[str], told: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that prompts stand for; the size with them, where the picture must be of that too.

    Args:
        pipe: the pipeline; its call takes prompts.
        prompts: the prompts.
        told: what else its call is told.

    Raises:
        UserError: one names no picture, and the pipeline draws from one; or the other way round.
    """
    family = known_family(type(pipe).__name__)
    drawn_from = family is not None and family.from_picture
    check_named(prompts, drawn_from, type(pipe).__name__, "prompts")
    if family is None or not drawn_from:
        return {"prompt": list(prompts)}
    size = family.default_size(pipe)
    if told.get("height") and told.get("width"):
        size = Size(int(told["height"]), int(told["width"]), size.frames)
    pictures = pictures_of(prompts, size.height, size.width)
    sides = family.call_arguments(type(pipe).__name__, [""], None, size)
    kept = {name: value for name, value in sides.items() if name in OF_SIZE}
    return {**kept, "prompt": words_of(prompts), "image": pictures if len(pictures) > 1 else pictures[0]}


OF_SIZE = ("height", "width", "max_area", "_auto_resize")
"""Arguments that say the size of what is drawn."""
