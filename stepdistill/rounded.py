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
        return form.format(value)
    digits = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
