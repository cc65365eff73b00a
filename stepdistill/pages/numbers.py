"""Numbers as tables show them."""

from __future__ import annotations

import math


def with_error(value: float, error: float | None, form: str = "{:.4g}") -> str:
    """A number to the second digit of its standard error, such as ``1.234 ± 0.056``.

    Args:
        value: the number.
        error: its standard error, in the same unit; None or 0 where there is none.
        form: how the number is written then.
    """
    if error is None or not 0 < error < math.inf:
        return _unsigned_zero(form.format(value))
    digits = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{_unsigned_zero(f'{value:.{digits}f}')} ± {error:.{digits}f}"


def duration(seconds: float) -> str:
    """A time as people say it, such as ``45 s``, ``2 min 56 s``, ``3 h 20 min`` or ``4 d 2 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{seconds:.2g} s" if 0 < seconds < 10 else f"{whole} s"
    for small, large, unit, name in ((60, 3600, "s", "min"), (3600, 86400, "min", "h")):
        if whole < large:
            first, rest = divmod(whole, small)
            rest //= small // 60
            return f"{first} {name} {rest} {unit}" if rest else f"{first} {name}"
    days, rest = divmod(whole, 86400)
    return f"{days} d {rest // 3600} h" if rest >= 3600 else f"{days} d"


def _unsigned_zero(text: str) -> str:
    """A number below 0 by less than its last digit is written as 0."""
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text
