"""Diff-Instruct: descend the integral over noise levels of KL(student || teacher), from two scores and no data.

Luo et al. 2023, "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
2305.18455.

- Student turn: the gradient of integral w(t) KL(p_student,t || p_teacher,t) dt in the student's sample x is
  w(t) alpha (score_fake - score_real) = w(t) (alpha / sigma)^2 (x0_fake - x0_real), at x noised by a fresh (t, eps).
  The authors' code pushes x by x0_fake - x0_real, w = sigma^2 on their path with alpha = 1; here w = (sigma / alpha)^2
  gives the same on every path. No normaliser: that is what DMD adds.
- Fake turn: the ordinary diffusion loss on sg[x], before each update of the student.
- K steps: the student is trained where a rollout of its own exits, as in DMD2.

Differs from the paper: times are uniform in ``score_times`` and the fake network's loss is in its own output kind,
instead of EDM's log-normal noise levels and weights; the loss is a mean over elements instead of a sum. Left out:
dropout and augmentation of the fake network's samples (its copies of the teacher run in evaluation mode, so that both
networks are one function at the start and the field is exactly zero there).
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from stepdistill.fake_score import FakeScore, FakeScoreOptions, push, rollout, sampler_of, turn_at
from stepdistill.path import per_sample
from stepdistill.sampler import Sampler
from stepdistill.student import Student
from stepdistill.types import Batch, Method, MethodOptions, Teacher


class DiffInstruct(Method):
    """See the module's text."""

    class Options(FakeScoreOptions):
        fake_steps: int = 1  # the two networks alternate, the fake one first
        weight: Literal["x0", "kl"] = (
            "x0"  # w(t): (sigma / alpha)^2 as in the authors' code, or 1, the plain KL
        )

    def __init__(
        self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions
    ) -> None:
        super().__init__(teacher, student, times, options)
        self.options = cast(DiffInstruct.Options, options)
        self.fake = FakeScore(teacher)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student.net, "fake": self.fake.net}

    def lr_ratio(self, turn: str, step: int) -> float:
        return self.options.fake_lr_ratio if turn == "fake" else 1.0

    def turn(self, step: int) -> str:
        return turn_at(step, self.options)

    def sampler(self) -> Sampler:
        return sampler_of(self.student, self.times, self.options)

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        return rollout(self.student, self.sampler(), batch)

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """w(t) alpha (score_fake - score_real) at a noised x, [B, C, H, W]: where x should move away from."""
        views = self.fake.views(self.teacher, x, batch, self.options, self.options.guidance)
        if self.options.weight == "x0":
            return views.error
        alpha, sigma = self.student.path.alpha_sigma(views.t)
        return per_sample((alpha / sigma).square(), x) * views.error

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "fake":
            with torch.no_grad():
                x = self.generate(batch)
            loss = self.fake.denoising_loss(x, batch)
            return loss, {"denoising": loss}
        x = self.generate(batch)
        with torch.no_grad():
            field = self.field(x, batch)
        return push(x, field), {"field": field.abs().mean(), "x_std": x.detach().std()}
