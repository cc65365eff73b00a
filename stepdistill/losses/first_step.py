"""A student's first step learnt from the teacher's trajectory, which keeps what samples begin to differ in.

DP-DMD (Wu et al. 2026, "Diversity-Preserved Distribution Matching Distillation for Fast Visual Synthesis",
2602.03139): matching distributions by the reverse KL loses diversity mostly in the noisiest step. That step regresses
on the jump the guided teacher makes in a few short steps; matching trains the others alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.path import Path, Prediction, per_sample
from stepdistill.diffusion.remembered import at_time
from stepdistill.diffusion.solvers import solve
from stepdistill.losses.batch import Batch
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import Teacher


def x0_of_jump(path: Path, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The clean prediction [B, ...] at (x_t [B, ...], t [B]) whose DDIM step to s [B] ends in x_s: of the (x0, eps)
    that explain both states, the x0. On the flow path at t = 1 it is x_t - (x_t - x_s) / (1 - s)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    det = alpha_s * sigma_t - sigma_s * alpha_t
    return per_sample(sigma_t / det, x_s) * x_s - per_sample(sigma_s / det, x_t) * x_t


def first_step_loss(
    student: Student, teacher: Teacher, batch: Batch, guidance: float, calls: int, grid: int
) -> Tensor:
    """Mean squared difference of the student's x0 at pure noise to that of the teacher's jump, a scalar.

    On the flow path this is the paper's |u(eps, 1) - (eps - z) / (1 - t)|^2; stated in x0 it holds for a network of any
    output on any path.

    Args:
        student, teacher: whose first step, and whose jump.
        batch: its noise and conditions.
        guidance: of the teacher's trajectory.
        calls: the teacher's first steps, which make the jump.
        grid: all the steps it would take to the clean sample, on its own schedule.
    """
    noise, cond = batch.noise, batch.cond
    one = at_time(1.0, noise)
    times = [teacher.path.shifted(1 - i / grid) for i in range(calls + 1)]

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return teacher.predict(x, t, cond, guidance=guidance)

    with torch.no_grad():
        z = solve(predict, noise, times, "ddim")
        target = x0_of_jump(teacher.path, noise, one, z, at_time(times[-1], noise))
    return (student.predict(noise, one, cond).x0 - target).square().mean()
