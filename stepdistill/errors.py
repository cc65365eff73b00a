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


class OtherProcessError(UserError):
    """Another process of the same work has failed and says why; the command line ends without a second message."""


def first_line(error: BaseException) -> str:
    """``Kind: message`` of an error of other code, on one line of at most 200 characters and its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """``(did you mean X? There are: ...)`` for an unknown name."""
    names = sorted(allowed)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"({hint}there are: {', '.join(names) or 'none'})"
