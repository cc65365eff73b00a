"""Progressive distillation: a student's step is several of its teacher's, and then it is the teacher.

Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", 2202.00512.

- A stage: x_t at a time of the student's grid, from which the teacher takes ``ratio`` DDIM steps to the grid's next
  time s. The target (eq. 8) is the x0 whose one DDIM step from x_t ends where the teacher's ended,
  (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t); at s = 0 it is the end itself. On the
  straight path that is the mean of the teacher's velocities.
- Loss: w |x0 - target|^2 with w = max(alpha^2 / sigma^2, 1), "truncated SNR", or alpha^2 / sigma^2 + 1, "SNR + 1",
  which is the squared error in v (section 4).
- After ``stage_updates`` the student is the teacher of the next stage, with fewer steps: ``ratios`` says from stage to
  stage how many steps become one. The last stage has the student's own times, and goes on. (2, 2, 2) leads a student of
  one step over 4 and 2, from a teacher's 8. Guidance is that of the first teacher; all others have it in their weights.
- Rates fall to 0 along a line in each stage but the last, which has that of ``train.schedule``.
- The next teacher is the student, or, with ``teacher_decay``, the average of its weights, from which the student goes
  on, too (the paper's teachers are averages).

Times of a stage lie evenly between those of the last. With a discriminator in its stages it is ``lightning``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.first_step import x0_of_jump
from stepdistill.losses.progressive import ProgressiveMethod, ProgressiveOptions


class Progressive(ProgressiveMethod):
    """See the module's text."""

    class Options(ProgressiveOptions):
        stage_updates: PositiveInt = 2000  # of each stage; the last one goes on
        weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"  # of the error in x0
        anneal: bool = True  # whether the rate falls to 0 in each stage but the last

    options: Options

    def stage(self, step: int) -> int:
        return min(step // self.options.stage_updates, len(self.options.ratios) - 1)

    def lr_ratio(self, turn: Turn) -> float:
        updates, last = self.options.stage_updates, len(self.options.ratios) - 1
        annealed = self.options.anneal and self.stage(turn.step) < last
        return 1 - turn.step % updates / updates if annealed else 1.0

    @torch.no_grad()
    def lesson(self, batch: Batch, stage: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """x_t and the target [B, ...], t and the end s of the student's step [B], and the conditions."""
        jump = self.jump(batch, stage)
        target = x0_of_jump(self.student.path, jump.start, jump.t, self.taught(jump, stage), jump.s)
        return jump.start, target, jump.t, jump.s, jump.cond

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        start, target, t, _, cond = self.lesson(batch, self.stage(turn.step))
        residual = self.student.predict(start, t, cond).x0 - target
        alpha, sigma = self.student.path.alpha_sigma(t)
        snr = (alpha / sigma).square()
        weight = snr.clamp_min(1) if self.options.weighting == "truncated_snr" else snr + 1
        loss = (per_sample(weight, residual) * residual.square()).mean()
        return Loss(loss, {"residual": rms(residual)})
