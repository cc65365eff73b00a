"""How a student is sampled: which times its network is called at, and what lies between two calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.path import Path, Prediction, TablePath, per_sample
from stepdistill.diffusion.remembered import at_time
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.families.condition import GUIDANCE, Condition

if TYPE_CHECKING:
    from stepdistill.networks.denoiser import Denoiser


class Step(NamedTuple):
    """What lies between two calls: x_s = mean + std n with n standard normal, a Gaussian policy where std is not 0.

    Attributes:
        state: x_s [B, ...].
        mean: of it [B, ...], with the prediction's graph.
        std: its deviation [B], the same for every element of a sample.
    """

    state: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Sampler:
    """A few-step sampler: at each time predict x0, then go to the next time, and end with x0.

    Where the first time t is below 1, the network is still handed standard normal noise, as though that were a state at
    t: it is a generator that is called at t (DMD2's SDXL at timestep 399, SiD-LSG at 625), and no point of a trajectory
    is alpha x0 + sigma eps there. So only a method that matches the distribution of what is drawn can train it
    (``Method.starts_below``); an x0 error that an eps or v output makes is smaller there than at t = 1.

    Attributes:
        times: where the network is called, descending; the first, 1 or less, with pure noise.
        renoise: go on with fresh noise, alpha x0 + sigma eps (consistency sampling); otherwise with the predicted
            noise (DDIM, Euler).
        grid: for a student trained on a grid of this many times, any of whose step counts may be drawn; None for a
            student trained at ``times`` alone.
        guidance: the scale that a student with a guidance embedding is given; None for any other student, whose
            guidance is in its weights.
        two_times: whether the network is told where each of its jumps ends.
        gamma: for a student that jumps from any time of a table to any other, the share in [0, 1] by which a jump goes
            past its end, from where fresh noise leads back (TCD, Zheng et al. 2024, 2402.19159); its last jump
            ends at timestep 0. A pipeline must be told of it, as its ``eta``. None for any other student.
        prediction_type: diffusers' name for the output of a student on a table, where it is not the teacher's kind.
        counts: the step counts of a student that was trained to draw in several; in n of them it is called at every
            (steps / n)-th of ``times``. None for any other student.
    """

    times: tuple[float, ...]
    renoise: bool
    grid: int | None = None
    guidance: float | None = None
    two_times: bool = False
    gamma: float | None = None
    prediction_type: str | None = None
    counts: tuple[int, ...] | None = None

    @property
    def gap(self) -> float | None:
        """t - s of every jump; None where the jumps differ in length."""
        gap = 1 / self.steps
        even = max(abs(t - (1 - i * gap)) for i, t in enumerate(self.times)) <= 1.5e-3
        return gap if even else None

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Step counts worth evaluating."""
        return self.counts or ((1, 2, 4, 8) if self.grid else (self.steps,))

    def call_arguments(self) -> dict[str, float]:
        """What a pipeline's call needs besides its steps: TCD's gamma, which diffusers calls eta."""
        return {"eta": self.gamma} if self.gamma else {}

    def walk(
        self, denoiser: Denoiser, noise: Tensor, cond: Condition, fresh: Callable[[int], Tensor], calls: int
    ) -> Tensor:
        """The state [B, ...] at ``times[calls]``, after the first ``calls`` network calls."""
        x = noise
        for i in range(calls):
            t, s = (at_time(time, x) for time in self.times[i : i + 2])
            prediction = denoiser.predict(x, t, cond, s) if self.two_times else denoiser.predict(x, t, cond)
            x = self.step(prediction, s, lambda i=i: fresh(i)).state  # type: ignore[misc]
        return x

    def step(
        self, prediction: Prediction, s: Tensor, fresh: Callable[[], Tensor], eta: float | None = None
    ) -> Step:
        """The state at s [B] that follows a prediction, and the Gaussian that it was drawn from.

        x_s = alpha_s x0 + sigma_s (cos(eta pi / 2) eps + sin(eta pi / 2) n): every eta has the noise level of s, 0 is
        DDIM and 1 fresh noise alone (coefficients-preserving sampling, as RTDMD, 2605.26108, has it on a flow path).

        Args:
            prediction: of the call.
            s: where the step ends; 0 is clean data, where nothing is drawn.
            fresh: gives standard normal noise [B, ...]; asked for where some is needed.
            eta: share of fresh noise in [0, 1]; None is the sampler's own.
        """
        path, x0 = prediction.path, prediction.x0
        if self.gamma is not None:
            past = _past(path, s, self.gamma)
            ratio, std = path.kernel(past, s)
            mean = per_sample(ratio, x0) * prediction.at(past)
        else:
            share = float(self.renoise) if eta is None else eta
            alpha, sigma = path.alpha_sigma(s)
            std = sigma * math.sin(share * math.pi / 2)
            mean = per_sample(alpha, x0) * x0
            if share < 1:
                mean = mean + per_sample(sigma * math.cos(share * math.pi / 2), x0) * prediction.eps
            if share == 0:
                return Step(mean, mean, std)
        return Step(mean + per_sample(std, x0) * fresh(), mean, std)

    def draw(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Condition,
        fresh: Callable[[int], Tensor],
        *,
        through: bool = False,
    ) -> Tensor:
        """Clean states [B, ...]; the last call alone has a graph, unless all calls do.

        Args:
            denoiser: the student, or anything with its ``predict`` and ``path``.
            noise: standard normal start [B, ...].
            cond: conditions of the B samples.
            fresh: fresh(i) gives the standard normal noise [B, ...] that follows call i, from 0.
            through: whether all calls have a graph.
        """
        if self.guidance is not None:
            scales = torch.full((len(noise),), self.guidance, device=noise.device)
            cond = cond.with_tensor(GUIDANCE, scales)
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            x = self.walk(denoiser, noise, cond, fresh, self.steps - 1)
        t = at_time(self.times[-1], x)
        more = (torch.zeros_like(t),) if self.two_times else ()
        last = denoiser.predict(x, t, cond, *more)
        return last.x0 if self.gamma is None else last.at(_past(denoiser.path, torch.zeros_like(t), 0.0))


def _past(path: Path, s: Tensor, gamma: float) -> Tensor:
    """The time [B] of timestep floor((1 - gamma) n) of a table, n >= 0 being the timestep of s [B]."""
    assert isinstance(path, TablePath)
    n = ((s * path.steps).round() - 1).clamp_min(0)
    return (torch.floor((1 - gamma) * n) + 1) / path.steps


def schedule_times(path: Path, steps: int) -> tuple[float, ...]:
    """The times of K steps of a teacher on its path: the uniform ones, on a flow path with its time shift."""
    return tuple(path.shifted(time) for time in uniform_times(steps))
