"""f-distill: DMD for any f-divergence, each sample's field weighted by the density ratio that a discriminator reads.

Xu et al. 2025, "One-step Diffusion Models with f-Divergence Distribution Matching", 2502.15681, on top of DMD2
(Yin et al. 2024, 2405.14867).

- The gradient of D_f(p || q) = E_q[f(r)], r = p / q at x_t, is that of the reverse KL with each sample weighted by
  h(r) = r^2 f''(r): constant for the reverse KL (which is DMD), r for the forward KL, the others in ``WEIGHTS``.
- DMD2's discriminator of noised samples has log r as its best logit, with the data's density for p, which stands for
  the teacher's. So the GAN, and with it real images, is a part of the method.
- Twice normalised: r by its mean at that noise level (ten bins of t), then h by its mean.
- Student turn: the field h(r) (x0_fake - x0_real) / mean|x - x0_real| and the generator's GAN loss. Fake turn: the
  diffusion loss on sg[x] and the discriminator's loss.
- Optional: regression on cached pairs as a warm start or beside the rest, as in DMD.

Differs from the authors': both means are running ones, up to the step before, so that a sample's loss does not depend
on its neighbours; the discriminator reads the fake network's features, as DMD2's does, not the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import per_sample
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Turn
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, loss_with_gradient
from stepdistill.losses.gan import FeatureGan
from stepdistill.losses.running_means import StepSums

Divergence = Literal[
    "reverse_kl", "forward_kl", "js", "softened_reverse_kl", "hellinger", "neyman", "jeffreys"
]
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "hellinger": torch.sqrt,
    "neyman": lambda r: 1 / r,
    "jeffreys": lambda r: 1 + r,
}
"""h(r), up to a constant that the normalisation removes."""
BINS = 10
"""Noise levels with a mean ratio of their own."""


class RatioWeight(nn.Module):
    """h(r) with mean 1, from the discriminator's logits; its means follow what it has seen, one step behind."""

    def __init__(self, options: FDistill.Options) -> None:
        super().__init__()
        self.options, self.h = options, WEIGHTS[options.divergence]
        self.register_buffer("mean_ratio", torch.ones(BINS))
        self.register_buffer("mean_weight", self.h(torch.ones(1)))
        self.mean_ratio: Tensor
        self.mean_weight: Tensor
        self._seen = StepSums()  # sums and counts of r in each bin, sum and count of h

    @torch.no_grad()
    def forward(self, logit: Tensor, t: Tensor) -> Tensor:
        """Weights [B] from logits [B] at times [B]."""
        low, high = self.options.score_times
        where = ((t - low) / max(high - low, 1e-6) * BINS).long().clamp(0, BINS - 1)
        ratio = logit.float().exp().clamp(*self.options.ratio_range)
        weight = self.h(ratio / self.mean_ratio[where])
        bins = nn.functional.one_hot(where, BINS).double()
        sums = [ratio.double() @ bins, bins.sum(0), weight.double().sum()[None], bins.sum()[None]]
        self._seen.add(torch.cat(sums))
        return weight / self.mean_weight

    def update(self) -> None:
        """Takes what the step has seen, on every process, into the means."""
        seen = self._seen.take()
        if seen is None:
            return
        ratios, counts, weight = seen[:BINS], seen[BINS : 2 * BINS], seen[-2:-1] / seen[-1]
        now = torch.where(counts > 0, ratios / counts, self.mean_ratio.double())
        for mean, value in ((self.mean_ratio, now), (self.mean_weight, weight)):
            mean.lerp_(value.to(mean.dtype), 1 - self.options.ratio_ema)


class FDistill(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        guidance: float = 1.75  # of the teacher, for SD 1.5; 8 for SDXL
        fake_updates: int = 5  # updates of the fake network per student update; 9 for SD 1.5
        divergence: Divergence = "js"  # f, between the student and the teacher
        adversarial_weight: float = 1e-3  # of the generator's GAN loss, for SD 1.5; 5e-3 for SDXL
        ratio_range: tuple[float, float] = (0.1, 20.0)  # r is clamped to
        ratio_ema: float = 0.9  # decay of the running means; 0.5 in the authors' code at batches of thousands

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"images"}

    options: Options

    def setup(self) -> None:
        super().setup()
        self.weight = RatioWeight(self.options)

    def after_step(self, turn: Turn) -> None:
        self.weight.update()

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        gan = cast(FeatureGan, self.gan)
        with torch.no_grad():
            views = self.views(x, batch)
            weight = self.weight(gan.logits(views.x_t, views.t, batch.cond), views.t)
            field = per_sample(weight, x) * views.error / (views.distance + 1e-6)
        return loss_with_gradient(x, field), {
            "field": mean_size(field),
            "weight_std": weight.std(correction=0),
        }
