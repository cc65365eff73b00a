"""Steps along the probability-flow ODE dx/dt = alpha' x0 + sigma' eps, all with one signature.

A step takes what the network says at (x_t, t) and, for a multistep solver, what it said at the step before; it
returns x_s. ``predict`` is any function (x [B, ...], t [B]) -> Prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.diffusion.path import Prediction, per_sample
from stepdistill.diffusion.remembered import at_time, remembered

Predict = Callable[[Tensor, Tensor], Prediction]
Step = Callable[[Predict, Tensor, Prediction, Prediction | None, Tensor], Tensor]


def euler(predict: Predict, x_t: Tensor, now: Prediction, before: Prediction | None, s: Tensor) -> Tensor:
    """x_t + (s - t) dx/dt: first order, on the path's own time."""
    return x_t + per_sample(s - now.t, x_t) * now.velocity


def ddim(predict: Predict, x_t: Tensor, now: Prediction, before: Prediction | None, s: Tensor) -> Tensor:
    """alpha_s x0 + sigma_s eps (Song et al. 2020, 2010.02502): first order, exact where x0 and eps stay put."""
    return now.at(s)


def heun(predict: Predict, x_t: Tensor, now: Prediction, before: Prediction | None, s: Tensor) -> Tensor:
    """The trapezoid of the velocities at t and at the Euler point (Karras et al. 2022, 2206.00364, alg. 1): second
    order, two calls; the last step, to clean data, is a DDIM step."""
    if _is_clean(s):
        return now.at(s)
    gap = per_sample(s - now.t, x_t)
    then = predict(x_t + gap * now.velocity, s)
    return x_t + gap * (now.velocity + then.velocity) / 2


def dpmpp_2m(predict: Predict, x_t: Tensor, now: Prediction, before: Prediction | None, s: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, alg. 2): second order, one call; first and last step are DDIM."""
    path = now.path
    if before is None or _is_clean(s):
        return now.at(s)
    # Around pure noise on a flow path alpha is 0 and its log is not finite: that first step has no `before`, but the
    # second one would see lambda(1) = -inf as its last width; the ratio of widths is then 0 and the step first order.
    start, end, last = (path.log_snr_half(time) for time in (now.t, s, before.t))
    width, last_width = end - start, start - last
    lead = torch.where(torch.isfinite(last_width), width / (2 * last_width), torch.zeros_like(width))
    x0 = now.x0 + per_sample(lead, x_t) * (now.x0 - before.x0)
    (alpha, sigma), (_, sigma_t) = path.alpha_sigma(s), path.alpha_sigma(now.t)
    return per_sample(sigma / sigma_t, x_t) * x_t - per_sample(alpha * torch.expm1(-width), x_t) * x0


@remembered
def _is_clean(s: Tensor) -> bool:
    """Whether the times s [B] are all those of clean data."""
    return bool((s <= 0).all())


SOLVERS: dict[str, Step] = {"euler": euler, "ddim": ddim, "heun": heun, "dpm++2m": dpmpp_2m}


def trajectory(predict: Predict, x: Tensor, times: Sequence[float], solver: str) -> Iterator[Tensor]:
    """The states at times[1:], one after the other, of the ODE from x at times[0].

    Args:
        predict: the guided teacher, say.
        x: state at times[0], [B, ...].
        times: descending.
        solver: a name of SOLVERS.
    """
    step, before = SOLVERS[solver], None
    for t, s in pairwise(times):
        now = predict(x, at_time(t, x))
        x = step(predict, x, now, before, at_time(s, x))
        before = now
        yield x


def calls_of(solver: str, steps: int) -> int:
    """How often a trajectory of so many steps to clean data calls the network."""
    return 2 * steps - 1 if solver == "heun" else steps


def solve(predict: Predict, x: Tensor, times: Sequence[float], solver: str) -> Tensor:
    """The last state of that trajectory."""
    for state in trajectory(predict, x, times, solver):
        x = state
    return x


def uniform_times(steps: int) -> tuple[float, ...]:
    """1, 1 - 1/K, ..., 1/K."""
    return tuple(1 - i / steps for i in range(steps))
