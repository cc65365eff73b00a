"""Coverage: the share of real images whose own ball holds a drawn image (Naeem et al. 2020, 2002.09797, sec. 3).

Unlike recall it uses the balls of the real set alone, so outliers among the drawn images do not flatter it. Where both
sets have one distribution its expectation is 1 - (M-1)...(M-k) / ((M+N-1)...(M+N-k)) for M real and N drawn images,
whatever that distribution is.
"""

from __future__ import annotations

from stepdistill.metrics.balls import Balls


def coverage(balls: Balls) -> float:
    """In [0, 1]: the mean over real features of whether its ball holds a drawn feature."""
    return float(balls.reached.double().mean())
