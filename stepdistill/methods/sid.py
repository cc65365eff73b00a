"""SiD: a Fisher divergence between student and teacher, with gradients through what both networks see.

Zhou et al. 2024, "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for
One-Step Generation", 2404.04057; the few steps and the plain times of Zhou et al. 2024, "Long and Short Guidance in
Score identity Distillation for One-Step Text-to-Image Generation" (SiD-LSG), 2406.01561.

- Student turn: for x = G(noise), noised by a fresh (t, eps) to x_t, the loss is
  (x0_real - x0_fake) . ((x0_real - x) - alpha (x0_real - x0_fake)) / sg[mean|x - x0_real|].
  Its gradient flows through x, and through x_t into both networks, whose weights are frozen: without the latter it
  would be DMD's. With an exact fake score the first product alone is |x0_real - x0_fake|^2 in expectation, which is the
  divergence; the second, weighted by alpha, is the authors' correction of its gradient's bias. For alpha = 1 the loss
  is (x0_real - x0_fake) . (x0_fake - x).
- Fake turn: the ordinary diffusion loss on sg[x], before each update of the student.
- K steps: the student is trained where a rollout of its own exits.

Differs from the paper: times are uniform in ``score_times``, SiD-LSG's choice, instead of the EDM grid without its
noisiest fifth; the loss is a mean over elements instead of a hundred times the sum (Adam divides both out); the student
starts at t = 1 instead of sigma = 2.5. Left out: guidance of the fake network (SiD-LSG's long and short guidance),
the adversarial term of SiDA.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.fake_score import FakeScore, FakeScoreOptions, Views, rollout, sampler_of, turn_at
from stepdistill.sampler import Sampler
from stepdistill.student import Student
from stepdistill.types import Batch, Method, MethodOptions, Teacher


def numerator(views: Views, alpha: float) -> Tensor:
    """(x0_real - x0_fake) ((x0_real - x) - alpha (x0_real - x0_fake)), element by element, [B, C, H, W]."""
    gap = views.real.x0 - views.fake.x0
    return gap * ((views.real.x0 - views.x) - alpha * gap)


class SiD(Method):
    """See the module's text."""

    class Options(FakeScoreOptions):
        alpha: float = 1.2  # of the correction: 1.2, and 1.0 on AFHQ and for text to image (SiD, SiD-LSG)
        fake_steps: int = 1  # the two networks alternate, the fake one first

    def __init__(
        self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions
    ) -> None:
        super().__init__(teacher, student, times, options)
        self.options = cast(SiD.Options, options)
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

    def views(self, x: Tensor, batch: Batch) -> Views:
        """What both networks see in x, with the graph through their inputs."""
        return self.fake.views(
            self.teacher, x, batch, self.options, self.options.guidance, through_inputs=True
        )

    def divergence(self, views: Views) -> Tensor:
        """The student's loss at these views, a scalar."""
        # The floor is the authors': at t near 0 the teacher returns x itself.
        return (numerator(views, self.options.alpha) / views.distance.detach().clamp_min(1e-5)).mean()

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "fake":
            with torch.no_grad():
                x = self.generate(batch)
            loss = self.fake.denoising_loss(x, batch)
            return loss, {"denoising": loss}
        x = self.generate(batch)
        views = self.views(x, batch)
        logs = {"error": views.error.detach().abs().mean(), "x_std": x.detach().std()}
        return self.divergence(views), logs
