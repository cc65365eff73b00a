"""Distances of pictures from those of the same prompts and noises that another pipeline drew."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stepdistill.evaluation.rows import RowTable
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.intervals import of_mean
from stepdistill.metrics.kid import paired_kernel_distance

PAIRED = ("paired_distance", "paired_distance_se", "paired_rmse", "paired_rmse_se")


def paired(drawn: RowTable, teachers: RowTable, network: FeatureNetwork) -> dict[str, float | None]:
    """Distances of the pictures of the same numbers: of both sets by a kernel, which counts no picture with its own
    other; and of the pairs, in features, and of pixels in [0, 1]."""
    own, others = drawn.whole("features"), teachers.whole("features")
    kernel = paired_kernel_distance(own, others, gamma=network.kernel_scale)
    found: dict[str, float | None] = {"kid": kernel.value, "kid_se": kernel.standard_error}
    pairs = zip(drawn.whole("pixels"), teachers.whole("pixels"), strict=True)
    pixels = torch.stack([((a.float() - b.float()) / 255).square().mean().sqrt() for a, b in pairs])  # [N]
    apart = 1 - F.cosine_similarity(own, others)  # [N]
    for name, values in (("paired_distance", apart), ("paired_rmse", pixels)):
        interval = of_mean(values)
        found |= {name: interval.value, f"{name}_se": interval.standard_error}
    return found
