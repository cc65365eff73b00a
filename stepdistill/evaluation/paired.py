"""Distances of pictures from those of the same prompts and noises that another pipeline drew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F

from stepdistill.errors import UserError
from stepdistill.evaluation.rows import RowTable
from stepdistill.evaluation.teacher_scores import gap_closed
from stepdistill.features.network import FeatureNetwork
from stepdistill.metrics.frechet_error import GROUPS, paired_frechet_estimate
from stepdistill.metrics.kid import paired_kernel_distance
from stepdistill.metrics.standard_errors import of_mean

PAIRED = (
    *("fd", "fd_se", "kid", "kid_se"),
    *("paired_distance", "paired_distance_se", "paired_rmse", "paired_rmse_se"),
)
ERRORS = (
    f"fd: jackknife over {GROUPS} random groups of pairs; kid: jackknife over pairs; the others: of a mean"
)
"""How standard errors are computed, for reports."""
SURE = 2.0
"""Standard errors that the KID of the teacher with one step must be from 0 for a gap: our choice."""


def paired(drawn: RowTable, teachers: RowTable, network: FeatureNetwork) -> dict[str, float | None]:
    """Distances of the pictures of the same numbers: of both sets by their Gaussians, and by a kernel that counts no
    picture with its own other; and of the pairs, in features, and of pixels in [0, 1]. Errors leave out pairs: both
    pictures of a noise move with it."""
    own, others = drawn.whole("features"), teachers.whole("features")
    frechet = paired_frechet_estimate(own, others)
    kernel = paired_kernel_distance(own, others, gamma=network.kernel_scale)
    found: dict[str, float | None] = {
        "fd": network.fd_scale * frechet.value,
        "fd_se": network.fd_scale * frechet.standard_error,
        "kid": kernel.value,
        "kid_se": kernel.standard_error,
    }
    pairs = zip(drawn.whole("pixels"), teachers.whole("pixels"), strict=True)
    pixels = torch.stack([((a.float() - b.float()) / 255).square().mean().sqrt() for a, b in pairs])  # [N]
    apart = 1 - F.cosine_similarity(own, others)  # [N]
    for name, values in (("paired_distance", apart), ("paired_rmse", pixels)):
        estimate = of_mean(values)
        found |= {name: estimate.value, f"{name}_se": estimate.standard_error}
    return found


def gaps_closed(
    student: Mapping[int, Mapping[str, float | None]], teacher_one: Mapping[str, float | None]
) -> dict[str, float]:
    """The gap that a student closes against its teacher's pictures, by step count: 1 - KID of the student / KID of the
    teacher with one step. 0 is that teacher, 1 the teacher at full steps, whose KID is 0; by chance it may be above 1.

    Not by the Frechet distance: that of few pictures is far from 0 for a student of the teacher's very distribution
    that draws other pictures (DMD, SiD).

    Args:
        student: scores by step count, as :func:`paired` has them.
        teacher_one: those of the teacher with one step.

    Raises:
        UserError: the teacher's KID with one step is within two standard errors of 0, so there is no gap.
    """
    one, error = cast(float, teacher_one["kid"]), cast(float, teacher_one["kid_se"])
    if one <= SURE * error:
        raise UserError(f"the teacher's KID with one step is {one:.3g} ± {error:.2g}, not told apart from 0")
    return {str(steps): gap_closed(cast(float, scores["kid"]), one, 0.0) for steps, scores in student.items()}
