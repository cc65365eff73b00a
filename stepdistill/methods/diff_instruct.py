"""Diff-Instruct: descend the integral over noise levels of KL(student || teacher), from two scores and no data.

Luo et al. 2023, "Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
2305.18455.

- Student turn: the gradient of integral w(t) KL(p_student,t || p_teacher,t) dt in the student's sample x is
  w(t) alpha (score_fake - score_real) = w(t) (alpha / sigma)^2 (x0_fake - x0_real), at x noised by a fresh (t, eps).
  The authors' code pushes x by x0_fake - x0_real, w = sigma^2 on their path with alpha = 1; here w = (sigma / alpha)^2
  gives the same on every path. No normaliser: that is what DMD adds.
- Fake turn: the ordinary diffusion loss on sg[x], before each update of the student.
- K steps: the student is trained where a rollout of its own exits, as in DMD2.
- Optional, and not in the paper: regression on cached pairs as a warm start or beside the rest, and a GAN.

Differs from the paper: times are uniform in ``score_times``, and for the fake network in (0, 1), where its loss has no
weight, instead of EDM's log-normal noise levels and weights; the loss is a mean over elements, not a sum. Left out:
dropout and augmentation of the fake network's samples (its copies of the teacher run in evaluation mode, so that both
networks are one function at the start and the field is exactly zero there).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.losses.batch import Batch
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, loss_with_gradient


class DiffInstruct(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        fake_updates: int = 1  # the two networks alternate, the fake one first
        weight: Literal["x0", "kl"] = (
            "x0"  # w(t): (sigma / alpha)^2 as in the authors' code, or 1, the plain KL
        )

    options: Options

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """w(t) alpha (score_fake - score_real) at a noised x, [B, C, H, W]: where x should move away from."""
        views = self.views(x, batch)
        if self.options.weight == "x0":
            return views.error
        alpha, sigma = self.student.path.alpha_sigma(views.t)
        return per_sample((alpha / sigma).square(), x) * views.error

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            field = self.field(x, batch)
        return loss_with_gradient(x, field), {"field": mean_size(field)}
