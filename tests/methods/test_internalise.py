"""A reward's guidance in the weights, on a Gaussian whose tilted law is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matching_toy import full_batch
from sampler_toy import teacher_scheduler
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath, Path, TablePath, TrigPath
from stepdistill.families.condition import Condition
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.rollout import visits
from stepdistill.methods.internalise import Internalise
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import SHAPE, Gaussian, ToyFamily, ToyTeacher, loss_of, toy_batch, toy_student

MU, S = 0.7, 0.8
A = torch.tensor([0.3, -0.2])
TABLE = TablePath.from_alphas_cumprod(teacher_scheduler().alphas_cumprod)
PATHS = {"flow": FlowPath(), "trig": TrigPath(), "table": TABLE}


def linear(images: Tensor, prompt: Tensor) -> Tensor:
    """R = a^T x."""
    return images.flatten(1) @ A


def between(
    path: Path, student: nn.Module, teacher: nn.Module, reward: Any = linear, **options: Any
) -> Internalise:
    roles = Copies(ToyTeacher(teacher, path, "x0"), toy_student(student, path, "x0"))
    method = Internalise(roles, (1.0, 0.75, 0.5, 0.25), Internalise.Options.model_validate(options))
    method.rewards = Rewards(lambda x0: x0, (reward,))
    return method


def tilted(path: Path, beta: float) -> Gaussian:
    """The exact denoiser of N(mu + s^2 a / beta, s^2): p exp(R / beta)."""
    found = Gaussian(path, MU, S)
    found.mean = nn.Parameter((MU + S**2 * A / beta)[:, None, None])
    return found


@pytest.mark.parametrize("name", PATHS)
def test_the_target_is_the_exact_prediction_for_the_tilted_law(name: str) -> None:
    path, batch = PATHS[name], toy_batch(8)
    method = between(path, Gaussian(path, MU, S), Gaussian(path, MU, S), beta=0.5)
    exact = Denoiser(tilted(path, 0.5), path, "x0", ToyFamily())
    met = visits(method.student, method.sampler(), batch, Condition(), 0.5)
    for visit in (
        met if name == "table" else met[1:]
    ):  # whose end holds a little of the data; the others' does not
        target, reward = method.target(visit, batch)
        wanted = exact.predict(visit.x, visit.t, Condition())
        torch.testing.assert_close(target.x0, wanted.x0, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(target.at(visit.t), visit.x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            reward, linear(Gaussian(path, MU, S)(visit.x, visit.t, Condition()), batch.prompt)
        )


class Inexact(nn.Module):
    """The velocity of the exact denoiser, with a share of error."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.exact, self.error = Gaussian(FlowPath(), MU, S), error

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return (1 - self.error) * (x - self.exact(x, t, cond)) / t[:, None, None, None]


def test_at_pure_noise_of_a_flow_path_a_teachers_error_is_no_slope_of_its_reward() -> None:
    """There the velocity of an exact teacher is x - mu, and the slope of its clean prediction 0."""
    path, batch = FlowPath(), toy_batch(8)
    roles = Copies(ToyTeacher(Inexact(0.01), path, "velocity"), toy_student(Inexact(0.01), path, "velocity"))
    method = Internalise(roles, (1.0, 0.5), Internalise.Options(beta=0.1))
    method.rewards = Rewards(lambda x0: x0, (linear,))
    at_noise, below = visits(method.student, method.sampler(), batch, Condition())
    torch.testing.assert_close(method.gradient(at_noise, batch)[1][0, :, 0, 0], 0.01 * A)
    target, _ = method.target(at_noise, batch)
    torch.testing.assert_close(target.velocity, 0.99 * (at_noise.x - MU))
    torch.testing.assert_close(target.at(at_noise.t), at_noise.x)
    tilted_below = (
        method.target(below, batch)[0].x0 - method.teacher.predict(below.x, below.t, Condition()).x0
    )
    assert float(tilted_below.abs().min()) > 0.5


def test_the_gradient_goes_through_the_teacher_to_the_state() -> None:
    """d x0 / d x = alpha s^2 / V, times a."""
    path, batch = FlowPath(), toy_batch(4)
    method = between(path, Gaussian(path, MU, S), Gaussian(path, MU, S))
    visit = visits(method.student, method.sampler(), batch, Condition())[2]
    slope = method.gradient(visit, batch)[1]
    wanted = 0.5 * S**2 / (0.25 * S**2 + 0.25) * A[None, :, None, None].expand(4, *SHAPE)
    torch.testing.assert_close(slope, wanted)
    assert not visit.x.requires_grad and not method.sampler().renoise


def test_many_steps_of_the_targets_draw_the_tilted_law() -> None:
    path, count = TABLE, 4000
    method = between(path, Gaussian(path, MU, S), Gaussian(path, MU, S), beta=0.5)
    method.times = tuple(1 - i / 200 for i in range(200))
    batch, x = toy_batch(count), toy_batch(count).noise
    start = visits(method.student, method.sampler(), batch, Condition(), 0.0, 1)[0]
    for time, end in zip(method.times, (*method.times[1:], 0.0), strict=True):
        visit = replace(start, x=x, time=time, end=end)
        x = method.target(visit, batch)[0].at(visit.s)
    # The table ends at alpha 0.068, and drawing starts from mean 0 all the same: x0 = mu + s (x - alpha mu) / sqrt(V).
    alpha, sigma = (float(value) for value in path.alpha_sigma(torch.ones(1)))
    wanted = (MU + S**2 * A / 0.5) * (1 - S * alpha / (alpha**2 * S**2 + sigma**2) ** 0.5)
    assert x.mean(0).flatten().tolist() == pytest.approx(wanted.tolist(), abs=0.04)
    assert float(x.std(0).mean()) == pytest.approx(S, abs=0.05)


@pytest.mark.parametrize("options", [{"move": "tilt", "beta": 1e9}, {"move": "unit", "length": 1e-9}])
def test_without_a_reward_the_student_that_is_its_teacher_stays(options: dict[str, Any]) -> None:
    path = FlowPath()
    method = between(path, Gaussian(path, MU, S), Gaussian(path, MU, S), **options)
    assert (
        max(float(loss_of(method, "student", full_batch(step=step))[0].detach()) for step in range(8)) < 1e-9
    )


def test_a_unit_moves_the_steps_end_by_its_length_whatever_the_reward_weighs_and_whoever_is_beside() -> None:
    path, batch = FlowPath(), toy_batch(6)
    steep = lambda images, prompt: (1 + 9 * prompt) * linear(images, prompt)  # noqa: E731
    for reward in (linear, steep):
        method = between(path, Gaussian(path, MU, S), Gaussian(path, MU, S), reward, move="unit", length=0.3)
        visit = visits(method.student, method.sampler(), batch, Condition())[1]
        said = method.teacher.predict(visit.x, visit.t, Condition())
        moved = method.target(visit, batch)[0].at(visit.s) - said.at(visit.s)
        wanted = 0.3 * (A / A.norm())[None, :, None, None].expand(6, *SHAPE)
        torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-4)


def test_the_loss_is_in_the_velocity_and_trains_the_student_alone() -> None:
    path = FlowPath()
    method = between(path, Gaussian(path, MU + 0.1, S), Gaussian(path, MU, S), beta=1e9)
    batch = next(b for b in (full_batch(step=s) for s in range(50)) if b.draws.shared_integer("exit", 4) == 2)
    loss, logs = loss_of(method, "student", batch)
    # x0 is off by 0.1 sigma^2 / V, and the velocity by that over t.
    wanted = (0.1 * 0.25 / (0.25 * S**2 + 0.25) / 0.5) ** 2
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3) and set(logs) == {"reward"}
    loss.backward()
    assert method.student.net.mean.grad is not None and method.teacher.denoiser.net.mean.grad is None


def test_a_unit_is_of_all_values_of_a_picture() -> None:
    path, direction = FlowPath(), torch.randn(8, generator=torch.Generator().manual_seed(0))
    gaussian = Gaussian(path, MU, S)
    method = between(path, gaussian, gaussian, lambda x, prompt: x.flatten(1) @ direction, move="unit")
    visit = visits(method.student, method.sampler(), toy_batch(6), Condition())[1]
    visit = replace(visit, x=torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(1)))
    moved = method.target(visit, toy_batch(6))[0].at(visit.s)
    moved = moved - method.teacher.predict(visit.x, visit.t, Condition()).at(visit.s)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((6,), 0.1), atol=1e-5, rtol=1e-3)
