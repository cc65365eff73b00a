"""Halving: one step of the student lands where two steps of the teacher land.

Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", 2202.00512, algorithm 2, one
round: a student of K steps from a teacher of 2K. A method from outside the package, explained in
docs/extend/own_method.md.
"""

from __future__ import annotations

from typing import cast

import torch

from stepdistill import extend as sd


class Halving(sd.Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(sd.PairOptions):  # of pairs: clean latents without real images
        largest_weight: float = 10.0  # of SNR = (alpha / sigma)^2, the weight of the loss in x0

    options: Options

    def sampler(self) -> sd.Sampler:
        return sd.Sampler(self.times, renoise=False)

    def loss(self, turn: sd.Turn, batch: sd.Batch) -> sd.Loss:
        guidance, path, pairs = self.options.guidance, self.student.path, cast(sd.Examples, batch.pairs)
        edges = torch.tensor([*self.times, 0.0], device=batch.draws.device)
        index = batch.draws.integers("step", len(self.times))
        t, s = edges[index], edges[index + 1]
        middle = (t + s) / 2
        x_t = path.noised(pairs.x0, batch.draws.normal("eps", batch.shape), t)

        # Two DDIM steps of the teacher, and the x0 with which one step arrives at the same point.
        first = self.teacher.predict(x_t, t, pairs.cond, guidance=guidance)
        second = self.teacher.predict(first.at(middle), middle, pairs.cond, guidance=guidance)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        ratio = sd.per_sample(sigma_s / sigma_t, x_t)
        target = (second.at(s) - ratio * x_t) / (
            sd.per_sample(alpha_s, x_t) - ratio * sd.per_sample(alpha_t, x_t)
        )

        weight = (alpha_t / sigma_t).square().clamp(1.0, self.options.largest_weight)  # [B]
        error = (self.student.predict(x_t, t, pairs.cond).x0 - target).square().flatten(1).mean(1)  # [B]
        return sd.Loss((weight * error).mean(), {"error": error.mean()})
