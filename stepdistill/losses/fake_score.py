"""The fake score of distribution matching: a network that follows the student's samples, and how a student meets it.

What Diff-Instruct, DMD, f-distill, SiD and SIM share: a role that starts as the teacher and learns to denoise the
student's samples, whose turns precede the student's; the student's rollout to one exit step; both networks' views of a
noised sample; a loss whose gradient is a given field; and, around them, the method that lacks only its own loss of
those views. Beside a student that is an adapter the fake network is one, too (2405.14867 trains SDXL's LoRA so).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor

from stepdistill.diffusion.guidance import in_interval
from stepdistill.diffusion.path import FlowPath, Prediction
from stepdistill.diffusion.remembered import at_time
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, MethodOptions, Trained, Turn
from stepdistill.losses.gan import FeatureGan
from stepdistill.losses.regression import WarmStartOptions, regression, warm_start_rate
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import Teacher

FakeLoss = Literal["output", "x0"]
"""In what a fake network's error is squared: its own output, or the clean sample read from it."""


class FakeTurnOptions(MethodOptions):
    """Options of a method with a second network that follows the student's samples: its turns and its loss."""

    # x0: what the fields are made of. An eps output would weigh an error in x0 by alpha^2 / sigma^2, which is nearly 0
    # at high noise, where those fields are largest. So do FastGen's recipes (SD 1.5, Flux, Wan); DMD2 on SD: output.
    fake_loss: FakeLoss = "x0"
    fake_updates: int = 1  # updates of the fake network per student update
    fake_lr_ratio: float = 1.0  # learning rate of the fake network over train.lr
    fake_warm_start: int = 0  # updates of the fake network before the student's first

    def phase(self, step: int, warm_start: int) -> str:
        """The stretch that the method's step is in, the first of ``warm_start`` updates."""
        if step < warm_start:
            return "warm start"
        return "fake score alone" if step < warm_start + self.fake_warm_start else "matching"


class FakeScoreOptions(FakeTurnOptions):
    """Options of a method with a fake score."""

    group: ClassVar[str] = "distribution matching"

    score_guidance: float | None = None  # of the real score where it should differ from that of the pairs
    # Times at which that is on, where fewer than in the pairs: far above data a guided x0 can be far too strong.
    score_guidance_interval: tuple[float, float] | None = None
    # Where the two scores are compared (DMD 4.1), before a flow teacher's time shift.
    score_times: tuple[float, float] = (0.02, 0.98)
    renoise: bool | None = None  # fresh noise between steps, or the predicted; default by the path
    # Rank of the fake network's adapter where the student is one (student.lora_rank); default the student's.
    fake_lora_rank: PositiveInt | None = None

    @property
    def score_scale(self) -> float:
        """The teacher's guidance where the scores are compared."""
        return self.guidance if self.score_guidance is None else self.score_guidance

    @property
    def score_interval(self) -> tuple[float, float]:
        """The times at which it is on."""
        return self.score_guidance_interval or self.guidance_interval


class ScoreOptions(FakeScoreOptions, WarmStartOptions):
    """Options of every ScoreMethod. Their defaults leave a method without data: no pairs, no images."""

    pair_weight: float = 0.0  # of the regression beside the method's own loss; 0 leaves it out
    adversarial_weight: float = (
        0.0  # of the generator's GAN loss on the fake network's features; 0: no images
    )
    discriminator_weight: float = 0.01  # of the discriminator's loss in the fake turn

    @property
    def needs(self) -> frozenset[str]:
        pairs = {"pairs", "states"} if self.pair_weight else set()
        return super().needs | pairs | ({"images"} if self.adversarial_weight else set())


@dataclass(frozen=True)
class Views:
    """What the teacher and the fake network see in the student's samples at one noise level each.

    Attributes:
        x: the student's clean samples [B, C, H, W].
        x_t: the same, noised.
        t: the times [B].
        real: the teacher's prediction at x_t, guided.
        fake: the fake network's, never guided.
    """

    x: Tensor
    x_t: Tensor
    t: Tensor
    real: Prediction
    fake: Prediction

    @property
    def error(self) -> Tensor:
        """x0_fake - x0_real [B, C, H, W], which is sigma^2 / alpha (score_fake - score_real)."""
        return self.fake.x0 - self.real.x0

    @property
    def distance(self) -> Tensor:
        """mean|x - x0_real| of each sample, [B, 1, 1, 1]: the normaliser of DMD and SiD."""
        return (self.x - self.real.x0).abs().mean(dim=tuple(range(1, self.x.ndim)), keepdim=True)

    @property
    def field(self) -> Tensor:
        """The error over that distance, [B, C, H, W]: where DMD moves x away from (2311.18828, eq. 7 and 8)."""
        return self.error / (self.distance + 1e-6)


def denoising_loss(fake: Denoiser, x: Tensor, batch: Batch, kind: FakeLoss) -> Tensor:
    """The fake network's diffusion loss of samples x [B, C, H, W] at uniform times of the teacher's schedule, squared
    in ``kind``; a scalar."""
    t, eps = batch.draws.uniform("fake t"), batch.draws.normal("fake eps", tuple(x.shape[1:]))
    t = fake.path.shifted(t)
    x_t = fake.path.noised(x, eps, t)
    if kind == "x0":
        return (fake.predict(x_t, t, batch.cond).x0 - x).square().mean()
    error = fake.raw(x_t, t, batch.cond) - fake.path.target(x, eps, t, fake.output)
    return error.square().mean()


def views_of(
    fake: Denoiser,
    teacher: Teacher | Denoiser,
    x: Tensor,
    batch: Batch,
    options: FakeScoreOptions,
    scale: float,
    *,
    through_inputs: bool = False,
    since: float = 0.0,
    group: int = 1,
    stream: str = "score",
) -> Views:
    """Both networks' views of x noised by a fresh (t, eps).

    Args:
        fake: the network that follows the student's samples.
        teacher: the frozen network; or another that stands in its place, without guidance.
        x: the student's clean samples [B, C, H, W]; its states at ``since`` where that is not 0.
        batch: their draws and conditions.
        options: where the scores are compared, and where guidance is on.
        scale: the teacher's guidance there.
        through_inputs: keep the graph from both predictions through x_t into x; otherwise there is none.
        since: where x is; the t of ``score_times`` in [0, 1] are then taken in [since, 1].
        group: consecutive samples that share (t, eps).
        stream: of the random numbers (t, eps).
    """
    low, draws = fake.path.unshifted(since), batch.draws.of_groups(group)
    t = fake.path.shifted(low + (1 - low) * draws.uniform(f"{stream} t", *options.score_times))
    t = t if group == 1 else t.repeat_interleave(group)
    guidance = in_interval(scale, t, *options.score_interval) if scale != 1.0 else 1.0
    with torch.set_grad_enabled(through_inputs and torch.is_grad_enabled()):
        eps = draws.normal(f"{stream} eps", tuple(x.shape[1:]))
        eps = eps if group == 1 else eps.repeat_interleave(group, 0)
        s = at_time(since, x)
        x_t = fake.path.renoise(x, s, t, eps) if since else fake.path.noised(x, eps, t)
        if isinstance(teacher, Denoiser):
            real = teacher.predict(x_t, t, batch.cond)
        else:
            look = teacher.predict_with_input_gradient if through_inputs else teacher.predict
            real = look(x_t, t, batch.cond, guidance=guidance)
        return Views(x, x_t, t, real, fake.predict(x_t, t, batch.cond))


def turn_at(step: int, options: FakeTurnOptions, warm_start: int) -> str:
    """Whose turn it is: ``warm_start`` student updates, ``fake_warm_start`` fake ones, then cycles of
    ``fake_updates`` fake updates and one of the student."""
    if step < warm_start:
        return "student"
    # In a cycle the fake network comes first: the student never follows a score that has not seen it.
    matching = step - warm_start - options.fake_warm_start
    last = matching >= 0 and matching % (options.fake_updates + 1) == options.fake_updates
    return "student" if last else "fake"


def sampler_of(student: Student, times: tuple[float, ...], options: FakeScoreOptions) -> Sampler:
    """How the student is sampled: the predicted noise between steps on a flow path, fresh noise on any other."""
    renoise = options.renoise
    return Sampler(times, not isinstance(student.path, FlowPath) if renoise is None else renoise)


def exit_of(batch: Batch, first: int, last: int) -> int:
    """The call in first .. last - 1 at which this batch's rollout ends: one for the whole batch."""
    return first + batch.draws.shared_integer("exit", last - first)


def rollout(student: Student, sampler: Sampler, batch: Batch, first: int = 0) -> Tensor:
    """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only that call has a graph.

    Backward simulation (Yin et al. 2024, 2405.14867, 4.5): the student meets in training what it meets in sampling.

    Args:
        student, sampler: who draws, and how.
        batch: its noise, conditions and draws.
        first: the first call that may be the last.
    """
    calls = exit_of(batch, first, sampler.steps)
    with torch.no_grad():
        start = sampler.walk(student, batch.noise, batch.cond, batch.fresh, calls)
    return student.predict(start, at_time(sampler.times[calls], start), batch.cond).x0


def loss_with_gradient(x: Tensor, field: Tensor) -> Tensor:
    """A scalar whose gradient in x [B, ...] is field / number of elements: descent moves x against the field."""
    return 0.5 * (x - (x - field).detach()).square().mean()


class ScoreMethod(Method):
    """A method that compares two scores: everything but its loss of a student's sample, :meth:`match`.

    Student turns: a warm start by regression on pairs where one is wanted, then ``match`` on the sample of a rollout,
    with the GAN's and the regression's losses beside it where they have a weight. Fake turns: the diffusion loss on
    sg[x], and the discriminator's.

    Attributes:
        through_inputs: whether the loss has a gradient through what both networks see; of the class, unless an option
            says it.
    """

    through_inputs: bool = False
    starts_below = True
    shows = frozenset({"sample"})
    options: ScoreOptions
    fake: Denoiser
    gan: FeatureGan | None

    @classmethod
    def shared_start(cls, options: MethodOptions) -> int:
        plain = cls.regression is ScoreMethod.regression and cls.turn is ScoreMethod.turn
        return options.warm_start if plain and isinstance(options, ScoreOptions) else 0

    def setup(self) -> None:
        self.fake = self.roles.add("fake", rank=self.options.fake_lora_rank)
        self.gan = FeatureGan(self.fake) if "images" in self.options.needs else None

    def trained(self) -> dict[str, Trained]:
        return {**super().trained(), "fake": Trained("fake", self.gan, follows=True)}

    def lr_ratio(self, turn: Turn) -> float:
        return (
            self.options.fake_lr_ratio if turn.network == "fake" else warm_start_rate(turn.step, self.options)
        )

    def turn(self, step: int) -> Turn:
        return Turn(turn_at(step, self.options, self.options.warm_start), step)

    def phase(self, step: int) -> str:
        return self.options.phase(step, self.options.warm_start)

    def sampler(self) -> Sampler:
        return sampler_of(self.student, self.times, self.options)

    def generate(self, batch: Batch) -> Tensor:
        """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only it has a graph."""
        return rollout(self.student, self.sampler(), batch)

    def sample(self, batch: Batch) -> Tensor:
        return self.generate(batch)

    def views(self, x: Tensor, batch: Batch) -> Views:
        """What both networks see in x [B, C, H, W], noised."""
        options, through = self.options, self.through_inputs
        scale = options.score_scale
        return views_of(self.fake, self.teacher, x, batch, options, scale, through_inputs=through)

    @abstractmethod
    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's own loss of the student's samples x [B, C, H, W], which have a graph, and what to log."""

    def regression(self, batch: Batch) -> Tensor:
        """The distance to x of what the student sees of it from a state of its trajectory, one of K at random."""
        return regression(self.student, self.times, batch, self.options.pair_distance)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if turn.network == "fake":
            return self.fake_loss(batch)
        if turn.step < self.options.warm_start:
            return Loss(self.regression(batch))
        x = self.generate(batch)
        loss, logs = self.match(x, batch)
        logs["x_std"] = x.detach().std()
        if self.gan is not None:
            logs["gan"] = self.gan.for_generator(x, batch)
            loss = loss + self.options.adversarial_weight * logs["gan"]
        if self.options.pair_weight:
            logs["regression"] = self.regression(batch)
            loss = loss + self.options.pair_weight * logs["regression"]
        return Loss(loss, logs, x)

    def fake_loss(self, batch: Batch) -> Loss:
        """The loss of a fake turn."""
        with torch.no_grad():
            x = self.generate(batch)
        return self.following(x, batch)

    def following(self, x: Tensor, batch: Batch) -> Loss:
        """The fake network's diffusion loss on the student's samples x [B, ...], which have no graph, and the
        discriminator's where there is one."""
        loss = denoising_loss(self.fake, x, batch, self.options.fake_loss)
        logs = {"denoising": loss}
        if self.gan is not None:
            logs["discriminator"] = self.gan.for_discriminator(x, cast(Examples, batch.images), batch)
            loss = loss + self.options.discriminator_weight * logs["discriminator"]
        return Loss(loss, logs)
