"""Diversity: how much the samples of one prompt differ, the mean of 1 - cosine over their pairs of features.

0 where every seed gives one image. It says nothing of quality: noise is diverse, too; read it beside the score of the
prompts. The sum over pairs is closed: with unit vectors f_i, sum_(i != j) f_i.f_j = |sum_i f_i|^2 - M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from stepdistill.metrics.float64 import wide


@dataclass(frozen=True)
class Diversity:
    """The mean over prompts, in [0, 2], and its standard error over prompts (0 for one prompt)."""

    value: float
    standard_error: float


def pairwise_diversity(features: Tensor) -> Diversity:
    """Of features [P, M, D]: M samples of each of P prompts.

    Raises:
        ValueError: fewer than 2 samples a prompt make no pair.
    """
    prompts, samples, _ = features.shape
    if samples < 2 or prompts < 1:
        raise ValueError(f"diversity needs 2 samples of a prompt, there are {samples} of {prompts} prompts")
    unit = F.normalize(wide(features), dim=2)
    similarity = (unit.sum(1).square().sum(1) - samples) / (samples * (samples - 1))  # [P]
    each = 1 - similarity
    error = float(each.std()) / math.sqrt(prompts) if prompts > 1 else 0.0
    return Diversity(float(each.mean()), error)
