"""What a student visits when it draws: the states of its own trajectory, which on-policy methods learn at.

States have no graph: a loss calls the student once more where it wants one. With ``eta`` the steps between are Gaussian
(``Sampler.step``), a policy whose actions have a density, whatever noise the exported sampler adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.diffusion.path import Prediction
from stepdistill.diffusion.remembered import at_time
from stepdistill.diffusion.solvers import Predict, solve
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.sampler import Sampler, Step


@dataclass(frozen=True)
class Visit:
    """A state that a student met, and the step that it made there.

    Attributes:
        x: the state [B, ...].
        time: its time.
        end: the time of the next; 0 after the last call.
        step: the step, without a graph.
        std: its deviation as a number, 0 where nothing was drawn.
    """

    x: Tensor
    time: float
    end: float
    step: Step
    std: float

    @property
    def t(self) -> Tensor:
        """The time of the state, [B]."""
        return at_time(self.time, self.x)

    @property
    def s(self) -> Tensor:
        """The time of the next, [B]."""
        return at_time(self.end, self.x)

    def to_the_end(self) -> Visit:
        """The same state, as though its step led to clean data."""
        return replace(self, end=0.0)


@torch.no_grad()
def visits(
    student: Denoiser,
    sampler: Sampler,
    batch: Batch,
    cond: Condition,
    eta: float | None = None,
    calls: int | None = None,
) -> list[Visit]:
    """The states at which the sampler's K calls are made, from the batch's noise on, and their steps.

    Args:
        student, sampler: who draws, and how.
        batch: its noise and draws.
        cond: conditions, the batch's own or others of as many samples.
        eta: share of fresh noise; None is the sampler's own.
        calls: after how many it ends; None is all of them.
    """
    x, found = batch.noise, list[Visit]()
    for call, (time, end) in enumerate(pairwise((*sampler.times, 0.0)[: 1 + (calls or sampler.steps)])):
        t, s = at_time(time, x), at_time(end, x)
        step = sampler.step(student.predict(x, t, cond), s, lambda call=call: batch.fresh(call), eta)  # type: ignore[misc]
        found.append(Visit(x, time, end, step, deviation(sampler, student, end, eta)))
        x = step.state
    return found


def deviation(sampler: Sampler, student: Denoiser, s: float, eta: float | None) -> float:
    """The deviation of a step to the time s, which no sample changes."""
    share = float(sampler.renoise) if eta is None else eta
    return float(student.path.alpha_sigma(torch.tensor([s]))[1]) * math.sin(share * math.pi / 2)


def led_to(predict: Predict, visit: Visit, calls: int) -> Prediction:
    """What one call must say at a visited state to go where ``calls`` DDIM steps of ``predict`` lead from it; of one
    call, what that says.

    Args:
        predict: the teacher, say.
        visit: the state, and where its step ends.
        calls: steps, evenly spaced in the path's own time.
    """
    now = predict(visit.x, visit.t)
    if calls == 1:
        return now
    path = now.path
    first, last = path.unshifted(visit.time), path.unshifted(visit.end)
    times = [path.shifted(first + (last - first) * i / calls) for i in range(1, calls)]
    then = now.at(at_time(times[0], visit.x))
    return path.through(visit.x, visit.t, solve(predict, then, (*times, visit.end), "ddim"), visit.s)


def squared(error: Tensor) -> Tensor:
    """The mean square of each sample, [B]."""
    return error.square().flatten(1).mean(1)


def mean_of_step(sampler: Sampler, said: Prediction, visit: Visit, eta: float | None) -> Tensor:
    """The mean [B, ...] of the step that a prediction at a visited state leads to, with the prediction's graph."""
    return sampler.step(said, visit.s, lambda: visit.x, eta).mean


def log_density(visit: Visit, mean: Tensor) -> Tensor:
    """The logarithm [B] of the density of the step that was made under another mean [B, ...], up to what no mean
    changes."""
    return -0.5 * ((visit.step.state - mean) / visit.std).square().flatten(1).sum(1)
