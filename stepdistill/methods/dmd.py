"""DMD2: match the student's noised distribution to the teacher's with two scores, one frozen and one that follows.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis", 2405.14867, on top of
Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", 2311.18828.

- Student turn: for x = G(noise), noised by a fresh (t, eps), (x0_fake - x0_real) / mean|x - x0_real| is the gradient
  of KL(student || teacher) (DMD eq. 7, 8; alg. 1 drops the leftover alpha_t, and so does this). The real score is
  guided, the fake one is not.
- Fake turn: the ordinary diffusion loss on sg[x] (DMD eq. 6), ``fake_updates`` times for each student update, so that
  the fake score keeps up (DMD2 4.2, two time-scale update rule).
- K steps: the student runs through its own first steps without a graph and is trained where it exits (DMD2 4.5,
  backward simulation): it meets in training what it meets in sampling.
- DMD2's one-step SDXL is called at timestep 399, still with pure noise: ``student.times: [0.4]`` (see ``Sampler``).
- Optional: a GAN on the fake network's features with real images (DMD2 4.3); DMD's regression on cached pairs (DMD
  eq. 9, in latent space instead of LPIPS), beside the rest or as a warm start (DMD2 starts one-step SDXL so).
- ``decoupled`` (Liu et al. 2025, 2511.22677; decoupled_guidance.py): the guidance in the real score acts at a
  time of its own, below the one the student was called at; the matching of distributions is unguided, at any time.
- ``reweight`` (Stream-R1's image form, 2605.03849; reweighting.py): the field of samples that ``terms.reward`` finds
  good, and of pixels that matter to it, counts more. A zero of the field stays one: no reward is climbed.
- ``first_step_weight`` (DP-DMD, Wu et al. 2026, 2602.03139; first_step.py): the first of K >= 2 steps learns from
  the teacher's trajectory alone and the others from matching. The paper keeps the graph of all of those; here the
  rollout exits at one of them, as above. Its steps are Euler steps, so that ``renoise`` is then off by default: fresh
  noise would replace the one in which the first step stores its diversity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Turn
from stepdistill.losses.decoupled_guidance import augmentation_field
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import (
    ScoreMethod,
    ScoreOptions,
    exit_of,
    loss_with_gradient,
    rollout,
    views_of,
)
from stepdistill.losses.first_step import first_step_loss
from stepdistill.losses.reweighting import Reweighting
from stepdistill.networks.sampler import Sampler


class DMD(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        guidance: float = 1.75  # of the teacher: 1.75 for SD 1.5, 8 for SDXL (DMD2 C.1)
        fake_updates: int = 5  # updates of the fake network per student update (DMD2 4.2)
        adversarial_weight: float = (
            0.0  # of the generator's GAN loss: 1e-3 for SD 1.5 (DMD2 C.1); 0: no images
        )
        pair_weight: float = 0.0  # 0.25 in DMD; 0 leaves it out
        decoupled: bool = False  # guidance at a time of its own
        first_step_weight: float = 0.0  # of the first step's regression: 0.05 in DP-DMD; 0 leaves it out
        first_step_calls: int = 5  # the teacher's steps that make its target
        first_step_grid: int = 30  # of so many to the clean sample
        reweight: Literal["none", "reward", "saliency", "both"] = "none"  # of the field, by terms.reward
        reweight_scale: float = 2.0  # beta of exp(beta reward) (Stream-R1's code)

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | ({"reward"} if self.reweight != "none" else set())

    options: Options

    def setup(self) -> None:
        super().setup()
        options, times = self.options, self.times
        wanted = options.reweight != "none"
        self.reweighting = Reweighting(options.reweight, options.reweight_scale) if wanted else None
        if self.options.first_step_weight and (len(times) < 2 or times[0] < 1):
            raise UserError(
                f"options.first_step_weight is {self.options.first_step_weight:g}, which takes two student.times or "
                f"more from 1.0 on, one to follow the teacher and one to match: found {list(times)}; or set it to 0"
            )

    @property
    def first_exit(self) -> int:
        """The first call that matching may train."""
        return 1 if self.options.first_step_weight else 0

    def sampler(self) -> Sampler:
        usual = super().sampler()
        keep = self.options.first_step_weight and self.options.renoise is None
        return replace(usual, renoise=False) if keep else usual

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        return rollout(self.student, self.sampler(), batch, self.first_exit)

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """(x0_fake - x0_real) / mean|x - x0_real| at a noised x, [B, C, H, W]: where x should move away from."""
        if self.options.decoupled:
            return self.decoupled_field(x, batch)
        return self.views(x, batch).field

    def decoupled_field(self, x: Tensor, batch: Batch) -> Tensor:
        """The unguided field, less what guidance adds at another time."""
        views = views_of(self.fake, self.teacher, x, batch, self.options, 1.0)
        call = exit_of(batch, self.first_exit, len(self.times))
        called_at = self.times[call] if call else 1.0  # pure noise settles nothing, wherever it is handed in
        towards = augmentation_field(self.teacher, x, batch, self.options, called_at)
        return views.field - towards

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        with torch.no_grad():
            field = self.field(x, batch)
            if self.reweighting is not None:
                field = field * self.reweighting.weights(x, self.rewards, batch.prompt)
        loss, logs = loss_with_gradient(x, field), {"field": mean_size(field)}
        if options.first_step_weight:
            logs["first_step"] = first_step_loss(
                self.student,
                self.teacher,
                batch,
                options.guidance,
                options.first_step_calls,
                options.first_step_grid,
            )
            loss = loss + options.first_step_weight * logs["first_step"]
        return loss, logs

    def after_step(self, turn: Turn) -> None:
        if self.reweighting is not None:
            self.reweighting.update()
