"""LADD: a discriminator on the teacher's own features, in latents, from the teacher's own samples.

Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation", 2403.12015, on
top of Sauer et al. 2023, "Adversarial Diffusion Distillation" (ADD), 2311.17042. From secondary sources.

- Real are cached samples of the guided teacher (``source: pairs``), for which nothing beside the GAN is needed; ADD has
  images. The student is called at one of its times, the first in ``first_share`` of all cases, on real latents noised
  to it; at t = 1 that is noise alone, as in sampling.
- Heads at several depths of the frozen teacher read its answer and real latents, both noised with draws of their own to
  times of a logit-normal law, whose mean above 0 is towards noise, where structure is judged. Losses of softplus, as in
  NVIDIA's FastGen, or with ``hinge`` the paper's: max(0, 1 - D(real)) + max(0, 1 + D(x)), and -D(x) for the student.
  Several turns of the heads precede each of the student.
- ADD, ``distillation_weight`` 2.5: c(t) |x - sg x0_T|^2 beside it, x0_T what the teacher, in one step, sees in x noised
  afresh, and c(t) = alpha(t). As x - x0_T = (sigma / alpha) (eps_T - eps), it is score distillation with a weight.
- R1 (``penalty_weight``, 1e-5 in ADD) is in what the heads are given.

Differs from the papers: depths are the family's three, not every block, and heads see times and prompts through the
teacher's features alone; ADD's discriminator is DINOv2 on pixels. Left out: the changing shares of times in LADD's
warm-up, and preference training after it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import per_sample
from stepdistill.diffusion.remembered import constant
from stepdistill.losses.adversarial import AdversarialMethod, AdversarialOptions, NotNegative
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import Source, examples, noised
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.gan import FeatureGan


class LADD(AdversarialMethod):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)
    starts_below = False

    class Options(AdversarialOptions):
        source: Source = "pairs"  # what real latents are: cached samples of the teacher, or images
        discriminator_updates: PositiveInt = 4  # updates of the heads per update of the student
        first_share: Annotated[float, Field(gt=0, le=1)] = (
            0.7  # of samples at the first of the student's times
        )
        noise_mean: float = 1.0  # of the logit of the times at which the heads look
        noise_deviation: PositiveFloat = 1.0  # its deviation
        hinge: bool = False  # the paper's losses; else those of softplus
        distillation_weight: NotNegative = 0.0  # of ADD's distillation: 2.5 there; 0 leaves it out

        @property
        def needs(self) -> frozenset[str]:
            return super().needs - {"images"} | {self.source}

    options: Options

    def discriminator(self) -> FeatureGan:
        return FeatureGan(self.teacher.denoiser, deep=True, times=self.noise_law, hinge=self.options.hinge)

    def noise_law(self, draws: Draws, stream: str) -> Tensor:
        """Logit-normal times [B]."""
        return torch.sigmoid(
            self.options.noise_mean + self.options.noise_deviation * draws.normal(stream, ())
        )

    def times_of(self, batch: Batch) -> Tensor:
        """The time [B] of the student's call for each sample."""
        first = batch.draws.uniform("first") < self.options.first_share
        count = len(self.times)
        later = 1 + batch.draws.integers("later", count - 1) if count > 1 else torch.zeros_like(first).long()
        return constant(self.times, first.device)[torch.where(first, torch.zeros_like(later), later)]

    def generate(self, batch: Batch) -> Tensor:
        """What the student sees in the batch's real latents, noised to its times, [B, ...]."""
        source, t = examples(batch, "images"), self.times_of(batch)
        eps = batch.draws.normal("eps", tuple(source.x0.shape[1:]))
        return self.student.predict(noised(self.student.path, source.x0, eps, t), t, source.cond).x0

    def sample(self, batch: Batch) -> Tensor:
        return Method.sample(self, batch)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        real = examples(
            batch, self.options.source
        )  # with its conditions, as what the student makes of it has
        found = super().loss(turn, replace(batch, images=real, cond=real.cond))
        return replace(found, sample=None)  # not of the batch's own noise and conditions

    def beside(self, x: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        weight = self.options.distillation_weight
        return {"distillation": (weight, self.distillation(x, batch))} if weight else {}

    def distillation(self, x: Tensor, batch: Batch) -> Tensor:
        """alpha(t) |x - x0_T(x noised to t)|^2, whose gradient goes through x where it is not noised."""
        path, draws = self.teacher.path, batch.draws
        t = path.shifted(draws.uniform("distillation t"))
        x_t = path.noised(x, draws.normal("distillation eps", tuple(x.shape[1:])), t)
        seen = self.teacher.predict(x_t, t, batch.cond, guidance=self.options.guidance).x0  # without a graph
        alpha, _ = path.alpha_sigma(t)
        return (per_sample(alpha, x) * (x - seen).square()).mean()
