"""The fake score of distribution matching: a network that follows the student's samples, and how a student meets it.

What Diff-Instruct, DMD, f-distill, SiD and SIM share: a copy of the teacher trained to denoise the student's samples,
whose turns precede the student's; the student's rollout to one exit step; both networks' views of a noised sample; and
a loss whose gradient is a given field.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.guidance import in_interval
from stepdistill.path import Prediction, TablePath
from stepdistill.sampler import Sampler
from stepdistill.student import Denoiser, Student
from stepdistill.types import Batch, MethodOptions, Teacher


class FakeScoreOptions(MethodOptions):
    """Options of a method with a fake score."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is on (2404.07724)
    fake_steps: int = 1  # updates of the fake network per student update
    fake_lr_ratio: float = 1.0  # learning rate of the fake network over train.lr
    fake_warm_start: int = 0  # updates of the fake network before the student's first
    score_times: tuple[float, float] = (0.02, 0.98)  # where the two scores are compared (DMD 4.1)
    renoise: bool | None = None  # fresh noise between steps, or the predicted; default by the path


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


class FakeScore(Denoiser):
    """A trainable copy of the teacher's network that learns to denoise the student's samples.

    Args:
        teacher: whose network is copied.
    """

    def __init__(self, teacher: Teacher) -> None:
        copy = teacher.denoiser.copy()
        super().__init__(copy.net, copy.path, copy.output, copy.family)

    def denoising_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """The diffusion loss in the network's own output kind on samples x [B, C, H, W], at t ~ U(0, 1); a scalar."""
        t, eps = batch.draws.uniform("fake t"), batch.draws.normal("fake eps", tuple(x.shape[1:]))
        x_t = self.path.sample(x, eps, t)
        error = self.raw(x_t, t, batch.cond) - self.path.target(x, eps, t, self.output)
        return error.square().mean()

    def views(
        self,
        teacher: Teacher,
        x: Tensor,
        batch: Batch,
        options: FakeScoreOptions,
        scale: float,
        *,
        through_inputs: bool = False,
    ) -> Views:
        """Both networks' views of x noised by a fresh (t, eps).

        Args:
            teacher: the frozen network.
            x: the student's clean samples [B, C, H, W].
            batch: their draws and conditions.
            options: where the scores are compared, and where guidance is on.
            scale: the teacher's guidance there.
            through_inputs: keep the graph from both predictions through x_t into x; otherwise there is none.
        """
        t = batch.draws.uniform("score t", *options.score_times)
        guidance = in_interval(scale, t, *options.guidance_interval) if scale != 1.0 else 1.0
        with torch.set_grad_enabled(through_inputs and torch.is_grad_enabled()):
            x_t = self.path.sample(x, batch.draws.normal("score eps", tuple(x.shape[1:])), t)
            look = teacher.predict_with_input_gradient if through_inputs else teacher.predict
            real = look(x_t, t, batch.cond, guidance=guidance)
            return Views(x, x_t, t, real, self.predict(x_t, t, batch.cond))


def turn_at(step: int, options: FakeScoreOptions, warm_start: int = 0) -> str:
    """Whose turn the optimiser step is: ``warm_start`` student updates, ``fake_warm_start`` fake ones, then cycles of
    ``fake_steps`` fake updates and one of the student."""
    if step < warm_start:
        return "student"
    # In a cycle the fake network comes first: the student never follows a score that has not seen it.
    matching = step - warm_start - options.fake_warm_start
    last = matching >= 0 and matching % (options.fake_steps + 1) == options.fake_steps
    return "student" if last else "fake"


def sampler_of(student: Student, times: tuple[float, ...], options: FakeScoreOptions) -> Sampler:
    """How the student is sampled: fresh noise between steps on a discrete path, the predicted noise on a flow path."""
    renoise = options.renoise
    return Sampler(times, isinstance(student.path, TablePath) if renoise is None else renoise)


def rollout(student: Student, sampler: Sampler, batch: Batch) -> Tensor:
    """The student's clean prediction [B, C, H, W] at a step drawn for the whole batch; only that call has a graph.

    Backward simulation (Yin et al. 2024, 2405.14867, 4.5): the student meets in training what it meets in sampling.
    """
    calls = batch.draws.shared_integer("exit", sampler.steps)
    with torch.no_grad():
        start = sampler.walk(student, batch.noise, batch.cond, batch.fresh, calls)
    t = torch.full((len(start),), sampler.times[calls], device=start.device)
    return student.predict(start, t, batch.cond).x0


def push(x: Tensor, field: Tensor) -> Tensor:
    """A scalar whose gradient in x [B, ...] is field / number of elements: descent moves x against the field."""
    return 0.5 * (x - (x - field).detach()).square().mean()
