"""SIM: any distance between the student's score and the teacher's, by the gradient of its implicit part; no data.

Luo et al. 2024, "One-Step Diffusion Distillation through Score Implicit Matching", 2410.16794.

- The divergence is E over t and x_t of d(y), y = score_student - score_teacher. Its gradient, which would need the
  derivative of the student's own score in its weights, equals that of a loss on samples (the score-divergence theorem):
  -d'(y) . (score_fake(x_t) - score(x_t | x)), for x = G(noise) and x_t = alpha x + sigma eps, differentiated through x
  and x_t with the weights of both networks frozen.
- With kappa = alpha / sigma^2: y = kappa (x0_fake - x0_real), score_fake - score(x_t | x) = kappa (x0_fake - x). Weight
  ``x0`` takes both without their kappa; ``score`` keeps it, which is w(t) = 1.
- Pseudo-Huber, d = sqrt(|y|^2 + c^2) - c with |.| over the whole sample: d' = y / sqrt(|y|^2 + c^2), which scales
  itself. L2, d = |y|^2: twice SiD's loss at alpha = 1 before its normaliser.
- Fake turn: the ordinary diffusion loss on sg[x], before each update of the student.
- K steps: the student is trained where a rollout of its own exits.
- Optional, and not in the paper: regression on cached pairs as a warm start or beside the rest, and a GAN.

Differs from the paper: times are uniform in ``score_times``; the student is called at t = 1 instead of sigma = 2.5
unless ``student.times`` says otherwise. The paper's value of c was not at hand: the default is that of Song and
Dhariwal 2023 (2310.14189) for consistency training.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.losses.batch import Batch
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views


class SIM(ScoreMethod):
    """See the module's text."""

    through_inputs = True

    class Options(ScoreOptions):
        distance: Literal["huber", "l2"] = "huber"  # d
        c: float = 0.00054  # of the Pseudo-Huber distance, times sqrt(elements of a sample)
        weight: Literal["x0", "score"] = "x0"  # w(t): such that kappa drops out, or 1
        stop_denominator: bool = (
            False  # no gradient through sqrt(|y|^2 + c^2): simpler, and not the theorem's
        )
        fake_updates: int = 1  # the two networks alternate, the fake one first

    options: Options

    def divergence(self, views: Views) -> Tensor:
        """-d'(y) . (score_fake - score(x_t | x)) of each sample, [B]."""
        y, implicit = views.error, views.fake.x0 - views.x
        if self.options.weight == "score":
            alpha, sigma = self.student.path.alpha_sigma(views.t)
            kappa = per_sample(alpha / sigma.square(), y)
            y, implicit = kappa * y, kappa * implicit
        inner = (y * implicit).flatten(1).sum(1)
        if self.options.distance == "l2":
            return -2 * inner
        c = self.options.c * math.sqrt(y[0].numel())
        size = (y.flatten(1).square().sum(1) + c**2).sqrt()
        return -inner / (size.detach() if self.options.stop_denominator else size)

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(x, batch)
        return self.divergence(views).mean(), {"error": mean_size(views.error)}
