"""DMD2: match the student's noised distribution to the teacher's with two scores, one frozen and one that follows.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis", 2405.14867, on top of
Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", 2311.18828.

- Student turn: x = G(noise); at a fresh (t, eps) the field (x0_fake - x0_real) / mean|x - x0_real| is the descent
  direction of KL(student || teacher) (DMD eq. 7 and 8; alg. 1 drops the leftover alpha_t, and so does this). It
  enters as 1/2 mean (x - sg[x - field])^2. The teacher is guided, the fake network is not.
- Fake turn: the ordinary diffusion loss of the fake network on sg[x] (DMD eq. 6), ``fake_steps`` times for each
  student update, so that it keeps up (DMD2 4.2, two time-scale update rule).
- K steps: the student is run through its own first steps without a graph and trained where it exits (DMD2 4.5,
  backward simulation), so that it meets in training what it meets in sampling.
- Optional: a GAN head on the fake network's features against real images (DMD2 4.3), and DMD's regression on cached
  (noise, teacher sample) pairs (DMD eq. 9, with a squared error in latent space in place of LPIPS).

Left out: nothing of the losses. The fake network and its head share one optimiser, as in the paper.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.discriminator import Discriminator, discriminator_loss, generator_loss
from stepdistill.pairs import PairOptions
from stepdistill.path import TablePath
from stepdistill.sampler import Sampler
from stepdistill.student import Denoiser, Student
from stepdistill.types import Batch, Condition, Examples, Method, MethodOptions, Teacher


class DMD(Method):
    """See the module's text."""

    class Options(PairOptions):
        guidance: float = 1.75  # classifier-free guidance of the real score; 1.75 for SD 1.5, 8 for SDXL (DMD2 C.1)
        fake_steps: int = 5  # updates of the fake network per student update (DMD2 4.2)
        fake_lr_ratio: float = 1.0  # learning rate of the fake network over train.lr
        t_min: float = 0.02  # least noise at which the two scores are compared (DMD 4.1)
        t_max: float = 0.98  # most
        renoise: bool | None = None  # between steps fresh noise (true) or the predicted (false); default by the path
        gan_weight: float = 0.0  # of the generator's GAN loss; 1e-3 for SD 1.5 (DMD2 C.1); 0 trains without images
        gan_fake_weight: float = 0.01  # of the discriminator's loss in the fake turn
        regression_weight: float = 0.0  # of the regression on pairs; 0.25 in DMD; 0 makes no pairs

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        options = cast(DMD.Options, options)
        images = {"images"} if options.gan_weight else set()
        pairs = {"pairs"} if options.regression_weight else set()
        return cls.needs | images | pairs

    def __init__(self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions) -> None:
        super().__init__(teacher, student, times, options)
        self.options = cast(DMD.Options, options)
        self.fake = cast(Denoiser, teacher.denoiser).copy()  # type: ignore[attr-defined]
        self.head = None
        if self.options.gan_weight:
            self.head = Discriminator(student.family.feature_width(student.net))

    def networks(self) -> dict[str, nn.Module]:
        fake = [self.fake.net] if self.head is None else [self.fake.net, self.head]
        return {"student": self.student.net, "fake": nn.ModuleList(fake)}

    def lr_ratio(self, network: str) -> float:
        return self.options.fake_lr_ratio if network == "fake" else 1.0

    def turn(self, step: int) -> str:
        return "student" if step % (self.options.fake_steps + 1) == self.options.fake_steps else "fake"

    def sampler(self) -> Sampler:
        renoise = self.options.renoise
        return Sampler(self.times, isinstance(self.student.path, TablePath) if renoise is None else renoise)

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        calls = batch.draws.shared_integer("exit", len(self.times))
        shape = tuple(batch.noise.shape[1:])
        with torch.no_grad():
            start = self.sampler().walk(
                self.student, batch.noise, batch.cond, lambda i: batch.draws.normal(f"renoise {i}", shape), calls
            )
        t = torch.full((len(start),), self.times[calls], device=start.device)
        return self.student.predict(start, t, batch.cond).x0

    def noised(self, x: Tensor, batch: Batch, stream: str, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
        """x at fresh times t ~ U(low, high) with fresh noise: (x_t, t, eps)."""
        t = batch.draws.uniform(f"{stream} t", low, high)
        eps = batch.draws.normal(f"{stream} eps", tuple(x.shape[1:]))
        return self.student.path.sample(x, eps, t), t, eps

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """(x0_fake - x0_real) / mean|x - x0_real| at a noised x, [B, C, H, W]: where x should move away from."""
        x_t, t, _ = self.noised(x, batch, "score", self.options.t_min, self.options.t_max)
        real = self.teacher.predict(x_t, t, batch.cond, guidance=self.options.guidance).x0
        fake = self.fake.predict(x_t, t, batch.cond).x0
        scale = (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (fake - real) / (scale + 1e-6)

    def logits(self, x: Tensor, cond: Condition, batch: Batch, stream: str) -> Tensor:
        """The discriminator's logits [B] for x noised to t ~ U(0, 1), both sides by the same law (DMD2 4.3)."""
        assert self.head is not None
        x_t, t, _ = self.noised(x, batch, stream, 0.0, 1.0)
        return cast(Tensor, self.head(self.fake.features(x_t, t, cond)))

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.student_loss(batch) if turn == "student" else self.fake_loss(batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.generate(batch)
        with torch.no_grad():
            field = self.field(x, batch)
        loss = 0.5 * (x - (x - field).detach()).square().mean()
        logs = {"field": field.abs().mean(), "x_std": x.detach().std()}
        if self.options.gan_weight:
            adversarial = generator_loss(self.logits(x, batch.cond, batch, "gan"))
            loss, logs["gan"] = loss + self.options.gan_weight * adversarial, adversarial.detach()
        if self.options.regression_weight:
            pairs = cast(Examples, batch.pairs)
            noise = cast(Tensor, pairs.noise)
            t = torch.full((len(noise),), self.times[0], device=noise.device)
            error = (self.student.predict(noise, t, pairs.cond).x0 - pairs.x0).square().mean()
            loss, logs["regression"] = loss + self.options.regression_weight * error, error.detach()
        return loss, logs

    def fake_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self.generate(batch)
        x_t, t, eps = self.noised(x, batch, "fake", 0.0, 1.0)
        target = self.fake.path.target(x, eps, t, self.fake.output)
        loss = (self.fake.raw(x_t, t, batch.cond) - target).square().mean()
        logs = {"denoising": loss.detach()}
        if self.options.gan_weight:
            images = cast(Examples, batch.images)
            real = self.logits(images.x0, images.cond, batch, "gan real")
            generated = self.logits(x, batch.cond, batch, "gan")
            adversarial = discriminator_loss(real, generated)
            loss, logs["discriminator"] = loss + self.options.gan_fake_weight * adversarial, adversarial.detach()
        return loss, logs
