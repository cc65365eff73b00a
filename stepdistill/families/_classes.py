"""Which pipeline classes no recording serves, told by their signatures, before anything is loaded or drawn."""

from __future__ import annotations

import inspect
from typing import Any

from stepdistill.errors import UserError

TOLD = frozenset({"prompt", "batch_size", "class_labels"})
"""Arguments of a call that say what is drawn, and that a run has."""


def check_class(kind: Any) -> None:
    """Refuses a class that does not draw one state from prompts, class numbers or nothing.

    Raises:
        UserError: saying which of its parts or arguments stands against it.
    """
    parts, call = (inspect.signature(way).parameters for way in (kind.__init__, kind.__call__))
    schedulers = [name for name in parts if name.endswith("scheduler")]
    if len(schedulers) > 1:
        raise unrecorded(
            kind, f"it draws in several stages, each with a scheduler of its own ({', '.join(schedulers)})"
        )
    needed = [
        name
        for name, each in call.items()
        if each.default is each.empty
        and each.kind is each.POSITIONAL_OR_KEYWORD
        and name not in TOLD | {"self"}
    ]
    if needed:
        raise unrecorded(kind, f"its call needs {', '.join(needed)}, which no prompt gives")
    if not TOLD & call.keys():
        raise unrecorded(kind, "its call takes neither prompts nor class labels nor a batch size")


def pictures_taken(kind: Any) -> list[str]:
    """Arguments of a class's call that are pictures or videos, which it may not draw without."""
    return [
        name
        for name, each in inspect.signature(kind.__call__).parameters.items()
        if name.rpartition("_")[2] in ("image", "images", "video", "conditions")
        and "ip_adapter" not in name
        and each.default is None
    ]


def unrecorded(kind: Any, reason: str) -> UserError:
    """The error for a class that cannot be recorded."""
    return UserError(
        f"no family for {kind.__name__}, and it cannot be recorded: {reason}. A family of your own is one file, see "
        "docs/extend/own_family.md: name it in the recipe's family"
    )
