"""Errors a user can act on: one line that says what was found, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints the message alone, without a traceback, and exits with 2."""


class MissingWeights(UserError):
    """A file of weights is not here: what does not need it can still be computed."""


class TrainingDiverged(UserError):
    """A loss or a gradient is not a finite number."""


class Unhealthy(UserError):
    """A run was stopped as its recipe wants it: a sign of trouble was seen."""


class OtherProcessError(UserError):
    """Another process of the same work has failed and says why; the command line ends without a second message."""


def first_line(error: BaseException) -> str:
    """``Kind: message`` of an error of other code, on one line of at most 200 characters and its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def near_names(found: str, allowed: Iterable[str]) -> list[str]:
    """At most five of the allowed names that ``found`` may have been meant for, the nearest first."""
    names = sorted(allowed)
    longer = [name for name in names if name.startswith(found)] if len(found) > 1 else []
    return list(dict.fromkeys([*difflib.get_close_matches(found, names, n=5, cutoff=0.6), *longer]))[:5]


def did_you_mean(found: str, allowed: Iterable[str], listing: str = "") -> str:
    """``(did you mean X? There are: ...)`` for an unknown name.

    Args:
        found: the name.
        allowed: all that there are.
        listing: the command that lists them, which stands in their place where they are more than five.
    """
    names = sorted(allowed)
    near = near_names(found, names)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    if listing and len(names) > 5:
        return f"({hint}`{listing}` lists all)"
    return f"({hint}there are: {', '.join(names) or 'none'})"
