"""The step between two calls as a Gaussian, and what a student visits by it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from sampler_toy import Output, teacher_scheduler

from stepdistill.diffusion.path import FlowPath, Prediction, TablePath, TrigPath
from stepdistill.diffusion.solvers import solve
from stepdistill.families.condition import Condition
from stepdistill.losses.rollout import led_to, log_density, squared, visits
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.sampler import Sampler
from stepdistill.testing.toys import Gaussian, Perceptron, ToyFamily, toy_batch, toy_student

TABLE = TablePath.from_alphas_cumprod(teacher_scheduler().alphas_cumprod)
PATHS = {"flow": FlowPath(), "flow shifted": FlowPath(3.0), "trig": TrigPath(), "table": TABLE}
TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(("eta", "variance"), [(0.0, 0.328), (0.5, 0.297), (0.9, 0.220), (1.0, 0.196)])
def test_the_variance_of_a_posterior_mean_drawn_at_every_share_of_fresh_noise(
    eta: float, variance: float
) -> None:
    """Four steps on the straight path with x0 = E[x0 | x_t] of N(0, 0.64); by the linear recursion."""
    path, generator = FlowPath(), torch.Generator().manual_seed(0)
    denoiser = Denoiser(Gaussian(path, 0.0, 0.8), path, "x0", ToyFamily())
    x = torch.randn(200_000, 1, generator=generator)
    with torch.no_grad():
        for t, s in zip(TIMES, (*TIMES[1:], 0.0), strict=True):
            said = denoiser.predict(x, torch.full((len(x),), t), Condition())
            end = torch.full((len(x),), s)
            fresh = lambda: torch.randn(200_000, 1, generator=generator)  # noqa: E731
            x = Sampler(TIMES, False).step(said, end, fresh, eta).state
    assert float(x.var()) == pytest.approx(variance, abs=0.003)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", PATHS)
def test_a_step_is_its_mean_and_its_deviation_and_has_the_noise_level_of_its_end(
    name: str, eta: float
) -> None:
    path, s = PATHS[name], torch.tensor([0.4, 0.4])
    x0, eps, n = torch.randn(3, 2, 5)
    said = path.read(eps, "eps", path.noised(x0, eps, torch.full((2,), 0.7)), torch.full((2,), 0.7))
    step = Sampler((0.7, 0.4), False).step(said, s, lambda: n, eta)
    torch.testing.assert_close(step.state, step.mean + step.std[:, None] * n)
    sigma = path.alpha_sigma(s)[1]
    torch.testing.assert_close(step.std, sigma * math.sin(eta * math.pi / 2))
    of_noise = step.mean - path.alpha_sigma(s)[0][:, None] * said.x0
    kept = (sigma.square() - step.std.square()).clamp_min(0).sqrt()
    torch.testing.assert_close(of_noise, kept[:, None] * said.eps, atol=1e-5, rtol=1e-4)


def test_no_noise_is_asked_for_where_none_is_added() -> None:
    path = FlowPath()
    said = path.read(torch.randn(2, 3), "velocity", torch.randn(2, 3), torch.full((2,), 0.7))
    step = Sampler((0.7,), False).step(said, torch.full((2,), 0.4), lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert torch.equal(step.state, said.at(torch.full((2,), 0.4))) and not bool(step.std.any())


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_step_past_its_end_and_back_has_the_kernel_as_its_gaussian(gamma: float) -> None:
    sampler = Sampler(TIMES, True, grid=50, gamma=gamma)
    student = Denoiser(Output(TABLE, "eps"), TABLE, "eps", ToyFamily())
    x, t, s = torch.randn(4, 2, 1, 1), torch.full((4,), 0.75), torch.full((4,), 0.5)
    said, n = student.predict(x, t, Condition()), torch.randn(4, 2, 1, 1)
    step = sampler.step(said, s, lambda: n)
    torch.testing.assert_close(step.state, step.mean + step.std[:, None, None, None] * n)
    # With unit noise as the prediction's, mean and deviation make up the noise level of s.
    unit = sampler.step(Prediction(TABLE, torch.zeros_like(x), torch.ones_like(x), t), s, lambda: n)
    level = (unit.mean[:, 0, 0, 0].square() + unit.std.square()).sqrt()
    torch.testing.assert_close(level, TABLE.alpha_sigma(s)[1])


@pytest.mark.parametrize("renoise", [True, False])
def test_what_is_visited_is_what_is_drawn_and_has_no_graph(renoise: bool) -> None:
    student, batch = toy_student(Perceptron(), FlowPath(), "velocity"), toy_batch(8)
    sampler = Sampler(TIMES, renoise)
    found = visits(student, sampler, batch, batch.cond)
    drawn = sampler.draw(student, batch.noise, batch.cond, batch.fresh)
    assert [(v.time, v.end) for v in found] == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert torch.equal(found[0].x, batch.noise) and torch.equal(found[-1].step.state, drawn)
    assert not any(v.x.requires_grad or v.step.mean.requires_grad for v in found)
    assert [bool(v.std) for v in found] == [renoise, renoise, renoise, False]
    for visit, later in pairwise(found):
        assert torch.equal(visit.step.state, later.x)


def test_a_rollout_may_end_early() -> None:
    student, sampler, batch = toy_student(Perceptron(), FlowPath()), Sampler(TIMES, False), toy_batch(4)
    every = visits(student, sampler, batch, Condition())
    for calls in range(1, len(TIMES) + 1):
        some = visits(student, sampler, batch, Condition(), calls=calls)
        assert [visit.time for visit in some] == list(TIMES[:calls])
        assert torch.equal(some[-1].step.state, every[calls - 1].step.state)


def test_a_mean_square_is_of_all_values_of_a_picture() -> None:
    error = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squared(error), error.square().mean((1, 2, 3)))


def test_the_density_of_a_step_is_that_of_its_gaussian() -> None:
    student, batch = toy_student(Perceptron(), FlowPath(), "velocity"), toy_batch(8)
    visit = visits(student, Sampler(TIMES, False), batch, batch.cond, 0.7)[1]
    other = visit.step.mean + 0.1
    both = [torch.distributions.Normal(mean, visit.std) for mean in (visit.step.mean, other)]
    wanted = [law.log_prob(visit.step.state).flatten(1).sum(1) for law in both]
    found = [log_density(visit, law.mean) for law in both]
    torch.testing.assert_close(found[1] - found[0], wanted[1] - wanted[0], atol=1e-4, rtol=1e-4)
    assert visit.std == pytest.approx(float(visit.step.std[0]))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_one_call_may_say_what_several_lead_to(name: str, calls: int) -> None:
    """The prediction's own DDIM step ends where those of the teacher do."""
    path: Any = PATHS[name]
    teacher = Denoiser(Output(path, "x0"), path, "x0", ToyFamily())
    batch = toy_batch(4)
    for visit in visits(teacher, Sampler(TIMES, False), batch, batch.cond):
        said = led_to(lambda x, t: teacher.predict(x, t, Condition()), visit, calls)
        times = torch.linspace(path.unshifted(visit.time), path.unshifted(visit.end), calls + 1).tolist()
        shifted = [path.shifted(time) for time in times]
        wanted = solve(lambda x, t: teacher.predict(x, t, Condition()), visit.x, shifted, "ddim")
        torch.testing.assert_close(said.at(visit.s), wanted, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(said.at(visit.t), visit.x, atol=2e-5, rtol=1e-4)
