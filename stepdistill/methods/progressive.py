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

Times of a stage lie evenly between those of the last. SDXL-Lightning (2402.13929) starts so, with ratios of 4, before
its adversarial stages, which are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.diffusion.remembered import constant
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SourceOptions, Target, examples, noised
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.first_step import x0_of_jump
from stepdistill.networks.sampler import Sampler


class Progressive(Method):
    """See the module's text."""

    class Options(SourceOptions):
        ratios: tuple[Annotated[int, Field(ge=2)], ...] = (2, 2, 2, 2)  # teacher's steps in one, by stage
        stage_updates: PositiveInt = 2000  # of each stage; the last one goes on
        weighting: Literal["truncated_snr", "snr_plus_one"] = "truncated_snr"  # of the error in x0
        teacher_decay: Annotated[float, Field(ge=0, lt=1)] = (
            0.0  # of the average that teaches; 0: the student
        )
        anneal: bool = True  # whether the rate falls to 0 in each stage but the last

    options: Options

    def setup(self) -> None:
        if not self.options.ratios:
            raise UserError("options.ratios is empty: give a number for each stage, such as [2, 2]")
        self.average = Target(self.roles, self.options.teacher_decay)
        several = len(self.options.ratios) > 1
        self.previous = self.roles.add("previous", trained=False) if several else None

    def stage(self, step: int) -> int:
        """The number of the stage, from 0, that the method's step is in."""
        return min(step // self.options.stage_updates, len(self.options.ratios) - 1)

    def parts(self, stage: int) -> int:
        """How many of the stage's steps one of the last stage's becomes."""
        return prod(self.options.ratios[stage + 1 :])

    def phase(self, step: int) -> str:
        return f"{len(self.times) * self.parts(self.stage(step))} steps"

    def lr_ratio(self, turn: Turn) -> float:
        updates, last = self.options.stage_updates, len(self.options.ratios) - 1
        annealed = self.options.anneal and self.stage(turn.step) < last
        return 1 - turn.step % updates / updates if annealed else 1.0

    def grid(self, parts: int) -> Sequence[float]:
        """The student's times and 0, with ``parts`` even steps, before a flow teacher's shift, from one to the next."""
        path, ends = self.student.path, [*self.times, 0.0]
        even = [path.unshifted(time) for time in ends]
        between = [path.shifted(a + (b - a) * k / parts) for a, b in pairwise(even) for k in range(1, parts)]
        return sorted({*ends, *between}, reverse=True)

    def teach(self, stage: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """What the stage's teacher says: the run's, guided, or the student of the stage before."""
        if stage == 0 or self.previous is None:
            return self.teacher.predict(x, t, cond, guidance=self.options.guidance)
        return self.previous.predict(x, t, cond)

    @torch.no_grad()
    def lesson(self, batch: Batch, stage: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """x_t and the target [B, ...], t and the end s of the student's step [B], and the conditions."""
        source, ratio, path = (
            examples(batch, self.options.source),
            self.options.ratios[stage],
            self.student.path,
        )
        parts = self.parts(stage)
        times = constant(tuple(self.grid(parts * ratio)), batch.noise.device)
        first = ratio * batch.draws.integers("time", parts * len(self.times))
        eps = batch.draws.normal("eps", tuple(source.x0.shape[1:]))
        t, s = times[first], times[first + ratio]
        start = state = noised(path, source.x0, eps, t)
        for k in range(ratio):
            said = self.teach(stage, state, times[first + k], source.cond)
            state = said.at(times[first + k + 1])
        return start, x0_of_jump(path, start, t, state, s), t, s, source.cond

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        start, target, t, _, cond = self.lesson(batch, self.stage(turn.step))
        residual = self.student.predict(start, t, cond).x0 - target
        alpha, sigma = self.student.path.alpha_sigma(t)
        snr = (alpha / sigma).square()
        weight = snr.clamp_min(1) if self.options.weighting == "truncated_snr" else snr + 1
        loss = (per_sample(weight, residual) * residual.square()).mean()
        return Loss(loss, {"residual": rms(residual)})

    def ends_stage(self, turn: Turn) -> bool:
        """Whether another stage begins after this turn."""
        return self.stage(turn.step + 1) > self.stage(turn.step)

    def after_step(self, turn: Turn) -> None:
        self.average.update()
        if self.ends_stage(turn):
            if self.options.teacher_decay:
                self.roles.become("student", "target")
            self.roles.become("previous", "student")

    def anew(self, turn: Turn) -> frozenset[str]:
        return frozenset({"student"} if self.options.teacher_decay and self.ends_stage(turn) else ())

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def sampler_at(self, step: int) -> Sampler:
        return Sampler(tuple(self.grid(self.parts(self.stage(step)))[:-1]), renoise=False)
