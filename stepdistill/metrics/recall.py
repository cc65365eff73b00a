"""Recall: the share of real images that lie where drawn images do (Kynkäänniemi et al. 2019, 1904.06991, eq. 2).

It falls when a generator leaves out what real images have: the measure of lost modes. Few drawn images have large
balls, which flatter it: only recalls of one count compare.
"""

from __future__ import annotations

from stepdistill.metrics.balls import Balls


def recall(balls: Balls) -> float:
    """In [0, 1]: the mean over real features of whether any drawn ball holds it."""
    return float(balls.covered.double().mean())
