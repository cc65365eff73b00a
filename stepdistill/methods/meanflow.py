"""MeanFlow distillation: the mean velocity of a jump, from the teacher's velocity and its own total derivative.

Geng et al. 2025, "Mean Flows for One-step Generative Modeling", 2505.13447, with the teacher's guided velocity in the
place of the conditional one; then it is Eulerian map distillation (Boffi et al. 2024, 2406.07507).

- The mean velocity u(x, t, s) = (1 / (t - s)) integral_s^t v is the one function with u + (t - s) Du/Dt = v, where
  Du/Dt = d_t u + grad_x u . v is its derivative along the trajectory (MeanFlow identity, eq. 6 and 8).
- Loss (eq. 9 and 10): |u - sg[v - (t - s) Du/Dt]|^2. The derivative is forward-mode or a difference, with no gradient
  through it, and its tangent is the very v of the target. It fades in over ``warmup`` updates: until then the target
  is the velocity, which the student has at its start.
- Weights (eq. 22): |e|^2 / sg(|e|^2 + c)^p, with |.|^2 summed over a sample.
- Guidance is the teacher's, so the student's one call has it baked in (4.2 mixes it from the student's own u instead).

Clean latents come from cached samples of the teacher, or from images. The student is told t - s through a slot of its
own class that is zero at the start. Left out: training without a teacher; label dropout, as nothing is unconditional.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from stepdistill.derivative import STEP, Derivative, Way
from stepdistill.draws import Draws
from stepdistill.flow_maps import adaptive, logit_normal, teacher_velocity
from stepdistill.pairs import PairOptions
from stepdistill.path import per_sample
from stepdistill.sampler import Sampler
from stepdistill.student import STRAIGHT, Student
from stepdistill.types import Batch, Examples, Method, MethodOptions, Teacher


class MeanFlow(Method):
    """See the module's text."""

    class Options(PairOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        source: Literal["pairs", "images"] = "pairs"  # where clean latents come from
        time_mean: float = -0.4  # of the logit of both times (MeanFlow table 4)
        time_deviation: float = 1.0  # of the same
        same: float = 0.25  # share of samples with s = t: plain velocity matching
        to_data: float = 0.25  # share of samples with s = 0
        noise_share: float = 0.0  # share of samples with t = 1, where every drawing starts
        power: float = 1.0  # p of the weight (MeanFlow table 1e)
        offset: float = 1e-3  # c of the weight
        warmup: int = 2000  # updates over which the derivative fades in; 0: it is whole from the start
        derivative: Way = "auto"  # exact, difference, or the first where it can be had
        derivative_step: float = STEP  # h of the differences, in units of [0, 1]

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        return cls.needs | {cast(MeanFlow.Options, options).source}

    def __init__(
        self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions
    ) -> None:
        super().__init__(teacher, student, times, options)
        self.options = cast(MeanFlow.Options, options)
        student.add_second_time()
        self.derivative = Derivative(self.options.derivative, self.options.derivative_step)

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False, two_times=True)

    def jumps(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Start t and end s <= t of each sample's jump, each [B]."""
        options = self.options
        a, b = (logit_normal(draws, name, options.time_mean, options.time_deviation) for name in ("a", "b"))
        t, s = torch.maximum(a, b), torch.minimum(a, b)
        t = torch.where(draws.uniform("start") < options.noise_share, torch.ones_like(t), t)
        kind = draws.uniform("kind")
        s = torch.where(kind < options.same + options.to_data, torch.zeros_like(s), s)
        return t, torch.where(kind < options.same, t, s)

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        options, draws = self.options, batch.draws
        source = cast(Examples, getattr(batch, options.source))
        x0, cond = source.x0, source.cond
        t, s = self.jumps(draws)
        x_t = STRAIGHT.sample(x0, draws.normal("eps", tuple(x0.shape[1:])), t)
        v = teacher_velocity(self.teacher, x_t, t, cond, options.guidance)

        def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.student.flow_velocity(x, t, s, cond)

        rate = self.derivative(u, (x_t, t, s), (v, torch.ones_like(t), torch.zeros_like(s)))
        share = min(1.0, draws.step / options.warmup) if options.warmup else 1.0
        error = u(x_t, t, s) - (v - share * per_sample(t - s, v) * rate)
        logs = {"residual": error.detach().square().mean().sqrt(), "rate": rate.square().mean().sqrt()}
        return adaptive(error, options.power, options.offset), {**logs, **self.derivative.logs()}
