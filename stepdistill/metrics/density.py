"""Density: in how many real balls a drawn image lies, over k (Naeem et al. 2020, 2002.09797, sec. 3).

Its expectation is 1 where both sets have one distribution; above 1, drawn images crowd where real ones are densest.
"""

from __future__ import annotations

from stepdistill.metrics.balls import Balls


def density(balls: Balls) -> float:
    """At least 0, and not bounded by 1: the mean over drawn features of the number of real balls around it, over k."""
    return float(balls.holding.double().mean() / balls.nearest)
