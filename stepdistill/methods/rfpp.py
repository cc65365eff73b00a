"""rf++: one round of reflow is enough, with times at both ends, a distance that forgives outliers and a good start.

Lee et al. 2024, "Improving the Training of Rectified Flows", 2405.20320.

- Pairs (z, x) as in reflow: x the teacher's sample from noise z, by Heun.
- Times: density a cosh(a (t - 1/2)) / (2 sinh(a/2)) on [0, 1], U-shaped: after a reflow the lines hardly cross, so the
  middle is easy, and what is left to learn is at the ends.
- Loss: (1 - t) rho(v - (z - x)) + P(x_t - t v, x) / t with rho(e) = (sqrt(|e|^2 + c^2) - c) / d and c = 0.00054 d for
  d elements. P is LPIPS in the paper; LPIPS has no meaning on latents, so P is rho on the clean samples or on the
  frozen teacher's features of them. Without P nothing would be learnt at t = 1, where one-step students live.
- Start: teachers on a variance-preserving or EDM path are read on the straight path at the same signal-to-noise
  ratio, so that before the first update the student's velocity is the teacher's.

Sampling: one step is z - v(z, 1). For K steps Euler (DDIM on the student's own path), as stock schedulers have it; the
paper's update x' = (1 - t') x0 + t' z with the initial noise z kept is a sampler that diffusers has not, and is left
out. Also left out: real images paired by inversion, which make the method ask for data.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from torch import Tensor

from stepdistill.diffusion.remembered import at_time
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, PairOptions, Turn
from stepdistill.losses.distances import distance
from stepdistill.losses.reflow import read_on_line
from stepdistill.networks.sampler import Sampler


def u_shaped(uniform: Tensor, side: Tensor, sharpness: float) -> Tensor:
    """Times [B] of density a cosh(a (t - 1/2)) / (2 sinh(a/2)) with a = ``sharpness``, from two uniforms [B].

    The first is sent through the inverse of the truncated exponential's distribution function, the second mirrors the
    result with probability 1/2.
    """
    y = torch.log1p(uniform * math.expm1(sharpness)) / sharpness
    return torch.where(side < 0.5, y, 1 - y)


class RFPP(Method):
    """See the module's text."""

    class Options(PairOptions):
        pair_steps: int = 18  # of Heun, the paper's for CIFAR-10; 40 for ImageNet
        pair_solver: Literal["euler", "ddim", "heun", "dpm++2m"] = "heun"
        sharpness: float = 4.0  # a of the times' density: at the ends cosh(2) = 3.8 times the middle
        t_min: float = (
            1e-3  # least time; 1e-5 in the paper, where the velocity is read without a division by t
        )
        clean: Literal["latents", "features"] = "latents"  # where P compares the clean samples
        clean_weight: float = 1.0  # of P
        clean_over_t: bool = True  # P over t, as the paper has it on CIFAR-10 ("F"); false in "E"
        feature_time: float = 0.02  # at which the teacher's features are read

    options: Options

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def times_of(self, batch: Batch) -> Tensor:
        """The batch's times [B] in [t_min, 1]."""
        draws, least = batch.draws, self.options.t_min
        t = u_shaped(draws.uniform("time"), draws.uniform("side"), self.options.sharpness)
        return least + (1 - least) * t

    def seen(self, x: Tensor, cond: Condition) -> Tensor:
        """What P compares of clean samples x [B, C, H, W]: themselves, or the teacher's features of them."""
        if self.options.clean == "latents":
            return x
        t = at_time(self.options.feature_time, x)
        denoiser = self.teacher.denoiser
        alpha, _ = denoiser.path.alpha_sigma(t[:1])
        return denoiser.features(alpha * x, t, cond)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        pairs, t = cast(Examples, batch.pairs), self.times_of(batch)
        z, x = cast(Tensor, pairs.noise), pairs.x0
        said = read_on_line(self.student, z, x, pairs.cond, t)
        velocity = distance(said.velocity, z - x, "huber", 1 - t)
        with torch.no_grad():
            wanted = self.seen(x, pairs.cond)
        over = 1 / t if self.options.clean_over_t else None
        clean = distance(self.seen(said.x0, pairs.cond), wanted, "huber", over)
        logs = {"velocity": velocity, "clean": clean}
        return Loss(velocity + self.options.clean_weight * clean, logs)
