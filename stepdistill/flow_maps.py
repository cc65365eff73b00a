"""What the flow-map methods share: the teacher on the straight path, times of a jump, and the weight of a residual.

A flow map X(x, t, s) = x - (t - s) u(x, t, s) takes a point at time t to the time s of the same trajectory. All of it
is stated on the straight path, where u is a mean velocity and u(x, t, t) the velocity itself (Boffi et al. 2024,
2406.07507; Geng et al. 2025, 2505.13447); networks of other paths are read there, so their weights serve as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.draws import Draws
from stepdistill.student import STRAIGHT, predict_elsewhere
from stepdistill.types import Condition, Teacher


@torch.no_grad()
def teacher_velocity(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor
) -> Tensor:
    """The teacher's guided velocity [B, C, H, W] at (x_t, t [B]) of the straight path."""
    return predict_elsewhere(
        lambda x, own_t: teacher.predict(x, own_t, cond, guidance=guidance), teacher.path, STRAIGHT, x_t, t
    ).velocity


def logit_normal(draws: Draws, stream: str, mean: float, deviation: float) -> Tensor:
    """Times [B] in (0, 1) whose logit is normal."""
    return torch.sigmoid(mean + deviation * draws.normal(stream, ()))


def adaptive(error: Tensor, power: float, offset: float) -> Tensor:
    """The mean over samples of |error|^2 / sg(|error|^2 + offset)^power, |.|^2 summed over a sample's elements
    (2505.13447, eq. 22)."""
    size = error.flatten(1).square().sum(1)  # [B]
    return (size / (size.detach() + offset) ** power).mean()
