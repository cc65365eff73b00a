"""What the reflow methods share: a student read on straight lines between noise z and a clean sample x.

The line is x_t = (1 - t) x + t z with velocity z - x (Liu et al. 2022, 2209.03003). A student keeps its own path and
output kind; it is read on the line at the angle where the signal-to-noise ratios agree, so that a variance-preserving
teacher's weights serve as they are, and stay those that diffusers expects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.diffusion.remembered import constant
from stepdistill.diffusion.solvers import solve, uniform_times
from stepdistill.families.condition import Condition
from stepdistill.losses.distances import DistanceName, distance
from stepdistill.losses.regression import annealed
from stepdistill.networks.denoiser import Denoiser


def read_on_line(student: Denoiser, z: Tensor, x: Tensor, cond: Condition, t: Tensor) -> Prediction:
    """What the student says at t [B] of the lines from z to x, each [B, C, H, W]: its ``velocity`` is to be z - x."""
    return student.predict_on(STRAIGHT, STRAIGHT.noised(x, z, t), t, cond)


def reflow_loss(student: Denoiser, z: Tensor, x: Tensor, cond: Condition, t: Tensor) -> Tensor:
    """E |v(x_t, t) - (z - x)|^2 per element (2209.03003, eq. 1); squared, as its minimiser is the mean velocity."""
    return distance(read_on_line(student, z, x, cond, t).velocity, z - x, "l2")


def distillation_loss(
    student: Denoiser,
    times: Sequence[float],
    z: Tensor,
    x: Tensor,
    cond: Condition,
    draws: Draws,
    name: DistanceName,
) -> Tensor:
    """The distance of the student's clean prediction to x, seen from the noise end or, of K times, from one of the K
    segments' starts (2209.03003, 2.2).

    Args:
        student: who predicts.
        times: the segments' starts on the student's own path, descending from 1.
        z, x: noise and the clean sample that belongs to it, [B, C, H, W].
        cond: their conditions.
        draws: the segment of each sample.
        name: the distance.
    """
    segment = draws.integers("segment", len(times))
    t = constant(times, z.device)[segment]
    state = student.path.noised(x, z, t)
    # The start of the first segment is pure noise, as in sampling, also where the path keeps a trace of data.
    state = torch.where(per_sample(segment == 0, z), z, state)
    return distance(student.predict(state, t, cond).x0, x, name)


def stage_rate(step: int, updates: int) -> float:
    """The learning rate within a stage whose flow is kept as it ends, over that of ``train``: annealed to 0, as weights
    at a high rate are no flow to draw pairs with, most of all of a network that says eps (ours).

    Args:
        step: within the stage, from 0.
        updates: of the stage.
    """
    return annealed(step / updates)


@torch.no_grad()
def flow_end(flow: Denoiser, z: Tensor, cond: Condition, steps: int) -> Tensor:
    """The clean end [B, C, H, W] of a flow from noise z [B, C, H, W], in equal Euler steps on the straight path."""
    times = (*uniform_times(steps), 0.0)
    # On this path a DDIM step is the Euler step, and it ends with x0 itself.
    return solve(lambda x, t: flow.predict_on(STRAIGHT, x, t, cond), z, times, "ddim")
