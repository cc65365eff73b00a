"""The same point on another path: equal signal-to-noise ratio, rescaled state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath, Path, Prediction, per_sample
from stepdistill.diffusion.remembered import remembered


def on_straight(path: Path, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point of the straight path where a network of ``path`` sees what it sees at x [B, ...] and t [B]."""
    return (x, t) if path == STRAIGHT else on_other_path(path, x, t, STRAIGHT)


STRAIGHT = FlowPath()
"""The path x_t = (1 - t) x0 + t eps on which flow maps are stated, whatever the networks' own path is."""


def on_other_path(path: Path, x_t: Tensor, t: Tensor, own: Path) -> tuple[Tensor, Tensor]:
    """The point of ``own`` with the signal-to-noise ratio of (x_t [B, ...], t [B]) on ``path``: its state and time.

    Past the end of a discrete table (pure noise on a flow path) that is the table's last point, which is how
    diffusers' schedulers start from pure noise.
    """
    own_t, scale = _carried(path, own, t)
    return per_sample(scale, x_t) * x_t, own_t


@remembered
def _carried(path: Path, own: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """The time on ``own`` and what the state is multiplied by, each [B]."""
    alpha, sigma = path.alpha_sigma(t)
    # Off both ends by rounding: time_of clamps there, and at the edge of a clamp forward mode has no derivative.
    angle = torch.atan2(sigma, alpha)
    own_t = own.time_of(angle * (1 - torch.finfo(angle.dtype).eps) + 1e-30)
    own_alpha, own_sigma = own.alpha_sigma(own_t)
    return own_t, torch.hypot(own_alpha, own_sigma) / torch.hypot(alpha, sigma)


def predict_elsewhere(
    predict: Callable[[Tensor, Tensor], Prediction], own: Path, path: Path, x_t: Tensor, t: Tensor
) -> Prediction:
    """What ``predict`` (x [B, ...], t [B] on ``own``) says about a point (x_t, t) of another path.

    Same angle, state rescaled, x0 carried over. The prediction's noise is what x_t and x0 leave, which at clean data
    is the predicted one.
    """
    if path == own:
        return predict(x_t, t)
    said = predict(*on_other_path(path, x_t, t, own))
    alpha, sigma = path.alpha_sigma(t)
    left = (x_t - per_sample(alpha, x_t) * said.x0) / per_sample(sigma, x_t).clamp_min(1e-12)
    return Prediction(path, said.x0, torch.where(per_sample(sigma == 0, x_t), said.eps, left), t)
