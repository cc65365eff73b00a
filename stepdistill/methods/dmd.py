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
- Optional warm start: ``warm_start`` updates of the student on cached (noise, teacher sample) pairs alone, then
  ``fake_warm_start`` of the fake network alone (DMD2 4.1 starts its one-step SDXL student so).
- Optional: a GAN head on the fake network's features against real images (DMD2 4.3), and DMD's regression on cached
  (noise, teacher sample) pairs (DMD eq. 9, with a squared error in latent space in place of LPIPS).

The fake network and its head share one optimiser, as in the paper.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from stepdistill.discriminator import Discriminator, discriminator_loss, generator_loss, noised_logits
from stepdistill.guidance import in_interval
from stepdistill.pairs import PairOptions
from stepdistill.path import TablePath
from stepdistill.sampler import Sampler
from stepdistill.student import Denoiser, Student
from stepdistill.types import Batch, Examples, Method, MethodOptions, Teacher


class DMD(Method):
    """See the module's text."""

    class Options(PairOptions):
        guidance: float = 1.75  # classifier-free guidance of the real score; 1.75 for SD 1.5, 8 for SDXL (DMD2 C.1)
        fake_steps: int = 5  # updates of the fake network per student update (DMD2 4.2)
        fake_lr_ratio: float = 1.0  # learning rate of the fake network over train.lr
        guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels t at which guidance is on (2404.07724)
        t_min: float = 0.02  # least noise at which the two scores are compared (DMD 4.1)
        t_max: float = 0.98  # most
        renoise: bool | None = None  # between steps fresh noise (true) or the predicted (false); default by the path
        gan_weight: float = 0.0  # of the generator's GAN loss; 1e-3 for SD 1.5 (DMD2 C.1); 0 trains without images
        gan_fake_weight: float = 0.01  # of the discriminator's loss in the fake turn
        regression: Literal["l1", "l2"] = "l2"  # its distance, a mean over elements
        regression_weight: float = 0.0  # of the regression on pairs; 0.25 in DMD; 0 leaves it out
        warm_start: int = 0  # first updates of the student, by regression alone
        warm_start_lr_ratio: float = 1.0  # their learning rate over train.lr
        fake_warm_start: int = 0  # updates of the fake network after them, before the student moves on

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        options = cast(DMD.Options, options)
        images = {"images"} if options.gan_weight else set()
        pairs = {"pairs"} if options.regression_weight or options.warm_start else set()
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

    def lr_ratio(self, turn: str, step: int) -> float:
        if turn == "fake":
            return self.options.fake_lr_ratio
        return self.options.warm_start_lr_ratio if step < self.options.warm_start else 1.0

    def turn(self, step: int) -> str:
        options = self.options
        if step < options.warm_start:
            return "student"
        matching = step - options.warm_start - options.fake_warm_start
        # In a cycle the fake network comes first: the student never follows a score that has not seen it.
        return "student" if matching >= 0 and matching % (options.fake_steps + 1) == options.fake_steps else "fake"

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

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """(x0_fake - x0_real) / mean|x - x0_real| at a noised x, [B, C, H, W]: where x should move away from."""
        t = batch.draws.uniform("score t", self.options.t_min, self.options.t_max)
        x_t = self.student.path.sample(x, batch.draws.normal("score eps", tuple(x.shape[1:])), t)
        guidance = in_interval(self.options.guidance, t, *self.options.guidance_interval)
        real = self.teacher.predict(x_t, t, batch.cond, guidance=guidance).x0
        fake = self.fake.predict(x_t, t, batch.cond).x0
        scale = (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return (fake - real) / (scale + 1e-6)

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "fake":
            return self.fake_loss(batch)
        return self.regression(batch) if batch.draws.step < self.options.warm_start else self.student_loss(batch)

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.generate(batch)
        with torch.no_grad():
            field = self.field(x, batch)
        loss = 0.5 * (x - (x - field).detach()).square().mean()
        logs = {"field": field.abs().mean(), "x_std": x.detach().std()}
        if self.head is not None:
            adversarial = generator_loss(noised_logits(self.head, self.fake, x, batch.cond, batch, "gan"))
            loss, logs["gan"] = loss + self.options.gan_weight * adversarial, adversarial.detach()
        if self.options.regression_weight:
            error, more = self.regression(batch)
            loss, logs = loss + self.options.regression_weight * error, {**logs, **more}
        return loss, logs

    def regression(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance of G(z) to x on cached pairs, at the first step."""
        pairs = cast(Examples, batch.pairs)
        noise = cast(Tensor, pairs.noise)
        t = torch.full((len(noise),), self.times[0], device=noise.device)
        error = self.student.predict(noise, t, pairs.cond).x0 - pairs.x0
        error = error.abs().mean() if self.options.regression == "l1" else error.square().mean()
        return error, {"regression": error.detach()}

    def fake_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self.generate(batch)
        t, eps = batch.draws.uniform("fake t"), batch.draws.normal("fake eps", tuple(x.shape[1:]))
        x_t = self.fake.path.sample(x, eps, t)
        target = self.fake.path.target(x, eps, t, self.fake.output)
        loss = (self.fake.raw(x_t, t, batch.cond) - target).square().mean()
        logs = {"denoising": loss.detach()}
        if self.head is not None:
            images = cast(Examples, batch.images)
            real = noised_logits(self.head, self.fake, images.x0, images.cond, batch, "gan real")
            generated = noised_logits(self.head, self.fake, x, batch.cond, batch, "gan")
            adversarial = discriminator_loss(real, generated)
            loss, logs["discriminator"] = loss + self.options.gan_fake_weight * adversarial, adversarial.detach()
        return loss, logs
