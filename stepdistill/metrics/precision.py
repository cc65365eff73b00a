"""Precision: the share of drawn images that lie where real images do (Kynkäänniemi et al. 2019, 1904.06991, eq. 2).

One outlier among the real images has a large ball and flatters it; density does not have that weakness.
"""

from __future__ import annotations

from stepdistill.metrics.balls import Balls


def precision(balls: Balls) -> float:
    """In [0, 1]: the mean over drawn features of whether any real ball holds it."""
    return float((balls.holding > 0).double().mean())
