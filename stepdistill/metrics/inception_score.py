"""Inception score: exp of the mean KL divergence of an image's classes from those of all images (Salimans et al. 2016,
1606.03498, sec. 4), the mean over splits.

    IS = exp E_x KL(p(y | x) || p(y)),   p(y) = E_x p(y | x)

It knows no real images, and rewards sharp, evenly spread classes of ImageNet whatever the task. Few images hold it
down: p(y) is then made of the very images that are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.metrics.float64 import wide


@dataclass(frozen=True)
class InceptionScore:
    """The mean over splits, in [1, classes], and the standard deviation between them (0 for one split)."""

    value: float
    deviation: float


def inception_score(logits: Tensor, *, splits: int = 10) -> InceptionScore:
    """Of logits [N, C] in the order of the images.

    Args:
        logits: of the classes, or their log-probabilities; the literature's are those of Inception without bias.
        splits: consecutive parts of (nearly) N / splits images that are scored each for itself; the literature has 10.
            One split does not depend on the order; of more, images in the order of their classes score near 1.

    Raises:
        ValueError: fewer images than splits.
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise ValueError(f"the Inception score of {splits} splits needs that many images, there are {count}")
    scores = []
    for part in range(splits):
        rows = logits[part * count // splits : (part + 1) * count // splits]
        log = wide(rows).log_softmax(1)  # [N / splits, C]
        share = log.exp()
        # Mean KL = H(mean p) - mean H(p); xlogy is 0 at probability 0.
        mean = share.mean(0)
        scores.append(
            (torch.special.xlogy(share, share).sum(1).mean() - torch.special.xlogy(mean, mean).sum()).exp()
        )
    every = torch.stack(scores)
    return InceptionScore(float(every.mean()), float(every.std(correction=0)))
