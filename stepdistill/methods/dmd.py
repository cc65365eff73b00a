"""DMD2: match the student's noised distribution to the teacher's with two scores, one frozen and one that follows.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis", 2405.14867, on top of
Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", 2311.18828.

- Student turn: for x = G(noise), noised by a fresh (t, eps), (x0_fake - x0_real) / mean|x - x0_real| is the gradient
  of KL(student || teacher) (DMD eq. 7, 8; alg. 1 drops the leftover alpha_t, and so does this). The real score is
  guided, the fake one is not.
- Fake turn: the ordinary diffusion loss on sg[x] (DMD eq. 6), ``fake_steps`` times for each student update, so that
  the fake score keeps up (DMD2 4.2, two time-scale update rule).
- K steps: the student runs through its own first steps without a graph and is trained where it exits (DMD2 4.5,
  backward simulation): it meets in training what it meets in sampling.
- Optional: a GAN on the fake network's features with real images (DMD2 4.3); DMD's regression on cached pairs (DMD
  eq. 9, in latent space instead of LPIPS), beside the rest or as a warm start (DMD2 starts one-step SDXL so).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.discriminator import FeatureGan
from stepdistill.distances import DistanceName, distance
from stepdistill.fake_score import FakeScore, FakeScoreOptions, push, rollout, sampler_of, turn_at
from stepdistill.pairs import PairOptions
from stepdistill.sampler import Sampler
from stepdistill.schedule import annealed
from stepdistill.student import Student
from stepdistill.types import Batch, Examples, Method, MethodOptions, Teacher


class DMD(Method):
    """See the module's text."""

    class Options(FakeScoreOptions, PairOptions):
        guidance: float = 1.75  # of the teacher: 1.75 for SD 1.5, 8 for SDXL (DMD2 C.1)
        score_guidance: float | None = None  # of the real score where it should differ from that of the pairs
        fake_steps: int = 5  # updates of the fake network per student update (DMD2 4.2)
        gan_weight: float = 0.0  # of the generator's GAN loss: 1e-3 for SD 1.5 (DMD2 C.1); 0: no images
        gan_fake_weight: float = 0.01  # of the discriminator's loss in the fake turn
        regression: DistanceName = "l2"  # distance of the regression on pairs
        regression_weight: float = 0.0  # 0.25 in DMD; 0 leaves it out
        warm_start: int = 0  # first updates of the student, by regression alone
        warm_start_lr_ratio: float = 1.0  # their learning rate over train.lr

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        options = cast(DMD.Options, options)
        regression = {"pairs", "states"} if options.regression_weight or options.warm_start else set()
        return cls.needs | regression | ({"images"} if options.gan_weight else set())

    def __init__(
        self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions
    ) -> None:
        super().__init__(teacher, student, times, options)
        self.options = cast(DMD.Options, options)
        self.fake = FakeScore(teacher)
        self.gan = FeatureGan(self.fake) if self.options.gan_weight else None

    def networks(self) -> dict[str, nn.Module]:
        fake = [self.fake.net] if self.gan is None else [self.fake.net, self.gan]
        return {"student": self.student.net, "fake": nn.ModuleList(fake)}

    def lr_ratio(self, turn: str, step: int) -> float:
        if turn == "fake":
            return self.options.fake_lr_ratio
        warm = self.options.warm_start  # annealed by itself, so that the next stage starts from its end
        return self.options.warm_start_lr_ratio * annealed(step / warm) if step < warm else 1.0

    def turn(self, step: int) -> str:
        return turn_at(step, self.options, self.options.warm_start)

    def sampler(self) -> Sampler:
        return sampler_of(self.student, self.times, self.options)

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        return rollout(self.student, self.sampler(), batch)

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """(x0_fake - x0_real) / mean|x - x0_real| at a noised x, [B, C, H, W]: where x should move away from."""
        scale = self.options.score_guidance or self.options.guidance
        views = self.fake.views(self.teacher, x, batch, self.options, scale)
        return views.error / (views.distance + 1e-6)

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "student" and batch.draws.step < self.options.warm_start:
            return self.regression(batch), {}
        return self.student_loss(batch) if turn == "student" else self.fake_loss(batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.generate(batch)
        with torch.no_grad():
            field = self.field(x, batch)
        loss = push(x, field)
        logs = {"field": field.abs().mean(), "x_std": x.detach().std()}
        if self.gan is not None:
            logs["gan"] = self.gan.for_generator(x, batch)
            loss = loss + self.options.gan_weight * logs["gan"]
        if self.options.regression_weight:
            logs["regression"] = self.regression(batch)
            loss = loss + self.options.regression_weight * logs["regression"]
        return loss, logs

    def regression(self, batch: Batch) -> Tensor:
        """The distance to x of what the student sees of it from a state of its trajectory, one of K at random."""
        pairs, steps = cast(Examples, batch.pairs), len(self.times)
        state, index = cast(Tensor, pairs.noise), batch.draws.integers("segment", steps)
        if pairs.states is not None:
            every = torch.cat([state[:, None], pairs.states], 1)  # [B, K, C, H, W]
            state = every[torch.arange(len(index), device=index.device), index]
        t = torch.tensor(self.times, device=index.device)[index]
        return distance(self.student.predict(state, t, pairs.cond).x0, pairs.x0, self.options.regression)

    def fake_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self.generate(batch)
        loss = self.fake.denoising_loss(x, batch)
        logs = {"denoising": loss}
        if self.gan is not None:
            logs["discriminator"] = self.gan.for_discriminator(x, cast(Examples, batch.images), batch)
            loss = loss + self.options.gan_fake_weight * logs["discriminator"]
        return loss, logs
