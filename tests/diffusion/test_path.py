"""Paths, predictions and solvers against closed forms: exact inverses, exact tables, exact changes of path, orders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.guidance import extrapolate, in_interval, rescaled
from stepdistill.diffusion.path import (
    EDMPath,
    FlowPath,
    Output,
    Path,
    Prediction,
    TablePath,
    TrigPath,
    per_sample,
)
from stepdistill.diffusion.solvers import SOLVERS, solve
from stepdistill.families.condition import Condition
from stepdistill.networks.denoiser import Denoiser
from stepdistill.testing.toys import Gaussian, ToyFamily, ToyTeacher

KINDS: tuple[Output, ...] = ("x0", "eps", "v", "velocity")


def alphas_cumprod() -> Tensor:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    table: Tensor = scheduler.alphas_cumprod
    return table


PATHS: dict[str, Path] = {
    "flow": FlowPath(),
    "trig": TrigPath(),
    "edm": EDMPath(80.0),
    "table": TablePath.from_alphas_cumprod(alphas_cumprod()),
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@pytest.fixture
def double() -> Iterator[None]:
    """float64 as the default, so that orders of convergence are seen below float32's rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- reading network outputs -------------------------------------------------------------------------------------


@EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_reading_inverts_the_target(path: Path, kind: Output) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    x0, eps = normal(49, 2, 3, seed=1), normal(49, 2, 3, seed=2)
    x_t = path.noised(x0, eps, t)
    said = path.read(path.target(x0, eps, t, kind), kind, x_t, t)
    # Rounding grows with the state over the output: sigma up to 80 on the EDM path, 1 / alpha up to 15 elsewhere.
    assert (said.x0 - x0).abs().max() < 1e-10
    assert (said.eps - eps).abs().max() < 1e-10
    assert torch.allclose(said.velocity, path.target(x0, eps, t, "velocity"), atol=1e-9)
    assert torch.allclose(said.at(t), x_t, atol=1e-10)


@EVERY_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_the_gain_is_how_far_the_clean_sample_moves_with_the_output(path: Path, kind: Output) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    x_t, said = normal(49, 2, seed=1), normal(49, 2, seed=2)
    moved = path.read(said + 1, kind, x_t, t).x0 - path.read(said, kind, x_t, t).x0
    assert torch.allclose(moved.abs(), path.x0_gain(kind, t)[:, None].expand(-1, 2), rtol=1e-6)


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    path, deviation = FlowPath(), 0.7
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    x = normal(2, 1, 1, 1).requires_grad_()
    alpha, sigma = (per_sample(value, x) for value in path.alpha_sigma(t))
    variance = (alpha * deviation).square() + sigma.square()
    (gradient,) = torch.autograd.grad((-x.square() / (2 * variance)).sum(), x)
    x0 = alpha * deviation**2 * x / variance
    said = path.read(x0, "x0", x, t)
    assert torch.allclose(said.score, gradient, atol=1e-12)


@EVERY_PATH
def test_rates_are_the_derivatives(path: Path) -> None:
    # Off the table's own entries, where its slope jumps.
    t = (torch.arange(1, 980, 37, dtype=torch.float64) + 0.5) / 1000
    if isinstance(path, TablePath):
        h = 1e-5
        (up, sup), (down, sdown) = path.alpha_sigma(t + h), path.alpha_sigma(t - h)
        wanted = (up - down) / (2 * h), (sup - sdown) / (2 * h)
        tolerance = 1e-6
    else:
        t = t.requires_grad_()
        wanted = tuple(
            torch.autograd.grad(value.sum(), t, retain_graph=True, allow_unused=True, materialize_grads=True)[
                0
            ]
            if value.requires_grad
            else torch.zeros_like(t)
            for value in path.alpha_sigma(t)
        )
        tolerance = 1e-9
    for ours, theirs in zip(path.rates(t), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@EVERY_PATH
def test_the_ends_of_a_path(path: Path) -> None:
    alpha, sigma = path.alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha[0] == 1 and sigma[0] == 0
    assert sigma[1] > 14 * alpha[1].abs()


@EVERY_PATH
def test_a_time_is_found_by_its_angle(path: Path) -> None:
    t = torch.cat([torch.linspace(0, 1, 1001), torch.linspace(0.0003, 0.9997, 501)]).double()
    # A table takes times within 1e-7 of an entry for the entry.
    assert (path.time_of(path.angle(t)) - t).abs().max() < (1e-7 if isinstance(path, TablePath) else 1e-12)
    assert (path.time_of(path.angle(t.float())) - t).abs().max() < 1e-6
    assert path.time_of(torch.tensor([math.pi / 2])) == 1  # past the end of a table: its last entry


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_the_table_is_diffusers_own(zero_terminal: bool) -> None:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero_terminal)
    for table in (scheduler.alphas_cumprod, alphas_cumprod()):
        path = TablePath.from_alphas_cumprod(table)
        n = torch.arange(1000)
        alpha, sigma = path.alpha_sigma(((n + 1).double() / 1000).float())  # as a float32 time gets there
        assert (alpha - table.sqrt()).abs().max() < 1e-7
        assert (sigma - (1 - table.double()).sqrt()).abs().max() < 1e-7
        timestep = ToyNetworkTime().time(path, ((n + 1).double() / 1000).float())
        assert torch.equal(timestep, n.float())


class ToyNetworkTime(ToyFamily):
    """A toy network that is given diffusers' own timesteps."""

    def time(self, path: Path, t: Tensor) -> Tensor:
        return super(ToyFamily, self).time(path, t)


def test_between_entries_the_timestep_is_a_fraction() -> None:
    family, path = ToyNetworkTime(), PATHS["table"]
    t = torch.tensor([0.75, 0.7504, 0.0005, 0.0, 1.0])
    assert torch.allclose(family.time(path, t), torch.tensor([749.0, 749.4, 0.0, 0.0, 999.0]), atol=1e-4)
    assert torch.allclose(family.time(FlowPath(), t), 1000 * t)


# --- moving along a path and between paths -----------------------------------------------------------------------


@EVERY_PATH
def test_renoising_has_the_marginal_of_the_later_time(path: Path) -> None:
    # x_t = (alpha_t / alpha_s) x_s + w eps must have alpha_t x0 and variance sigma_t^2 given x0: exactly, by linearity.
    s, t = torch.tensor([0.1, 0.4, 0.0]).double(), torch.tensor([0.3, 0.9, 0.5]).double()
    zero, one = torch.zeros(3, 1).double(), torch.ones(3, 1).double()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.alpha_sigma(s), path.alpha_sigma(t)
    from_x0 = path.renoise(alpha_s[:, None] * one, s, t, zero)
    from_old = path.renoise(sigma_s[:, None] * one, s, t, zero)
    from_new = path.renoise(zero, s, t, one)
    assert torch.allclose(from_x0[:, 0], alpha_t, atol=1e-12)
    assert torch.allclose((from_old.square() + from_new.square())[:, 0], sigma_t.square(), rtol=1e-10)
    assert torch.equal(path.renoise(one, s, s, zero), one)


@pytest.mark.parametrize("names", list(itertools.permutations(PATHS, 2)), ids="-".join)
def test_a_change_of_path_keeps_x0_and_noise(names: tuple[str, str]) -> None:
    own, other = (PATHS[name] for name in names)
    denoiser = Denoiser(Gaussian(own, 0.4, 0.6).double(), own, "x0", ToyFamily())
    # Times of the path that is asked; their angles lie on both paths.
    angle = torch.linspace(0.05, 1.45, 29, dtype=torch.float64)
    t, own_t = other.time_of(angle), own.time_of(angle)
    x0, eps = normal(29, 2, 1, 1, seed=3), normal(29, 2, 1, 1, seed=4)
    there = denoiser.predict_on(other, other.noised(x0, eps, t), t, Condition())
    here = denoiser.predict(own.noised(x0, eps, own_t), own_t, Condition())
    assert (there.x0 - here.x0).abs().max() < 1e-10
    assert (there.eps - here.eps).abs().max() < 1e-9
    # and it is what the closed form of the other path says
    exact = Denoiser(Gaussian(other, 0.4, 0.6).double(), other, "x0", ToyFamily())
    assert torch.allclose(there.x0, exact.predict(other.noised(x0, eps, t), t, Condition()).x0, atol=1e-10)


@pytest.mark.parametrize("names", list(itertools.permutations(PATHS, 2)), ids="-".join)
def test_a_ddim_step_commutes_with_a_change_of_path(names: tuple[str, str]) -> None:
    own, other = (PATHS[name] for name in names)
    denoiser = Denoiser(Gaussian(own, 0.4, 0.6).double(), own, "x0", ToyFamily())
    start, end = torch.full((4,), 1.2).double(), torch.full((4,), 0.7).double()
    x0, eps = normal(4, 2, 1, 1, seed=5), normal(4, 2, 1, 1, seed=6)
    own_t, own_s, t, s = own.time_of(start), own.time_of(end), other.time_of(start), other.time_of(end)
    here = denoiser.predict(own.noised(x0, eps, own_t), own_t, Condition()).at(own_s)
    there = denoiser.predict_on(other, other.noised(x0, eps, t), t, Condition()).at(s)
    (a, b), (c, d) = own.alpha_sigma(own_s), other.alpha_sigma(s)
    assert torch.allclose(here * per_sample(torch.hypot(c, d) / torch.hypot(a, b), here), there, atol=1e-9)


def test_pure_noise_of_a_flow_path_starts_a_table_at_its_last_entry() -> None:
    path = PATHS["table"]
    denoiser = Denoiser(Gaussian(path, 0.4, 0.6), path, "x0", ToyFamily())
    noise, one = torch.randn(3, 2, 1, 1), torch.ones(3)
    there = denoiser.predict_on(FlowPath(), noise, one, Condition())
    assert torch.allclose(there.x0, denoiser.predict(noise, one, Condition()).x0, atol=1e-6)
    assert torch.allclose(there.eps, noise)


# --- solvers -----------------------------------------------------------------------------------------------------

MEAN, DEVIATION = 0.4, 0.6


def exact(path: Path, x: Tensor, t: float, s: float) -> Tensor:
    """Where the probability-flow ODE of N(MEAN, DEVIATION^2) takes x from t to s."""
    (a, b), (c, d) = (tuple(float(v) for v in path.alpha_sigma(torch.tensor([time]))) for time in (t, s))
    spread = math.sqrt((c * DEVIATION) ** 2 + d**2) / math.sqrt((a * DEVIATION) ** 2 + b**2)
    return c * MEAN + spread * (x - a * MEAN)


def predictor(path: Path) -> Any:
    teacher = ToyTeacher(Gaussian(path, MEAN, DEVIATION), path)
    return lambda x, t: teacher.predict(x, t, Condition())


def slope(errors: list[float]) -> float:
    """The order at which the error falls when the step is halved, from the two finest."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("name", ["flow", "trig", "edm"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
def test_the_global_order_of_a_solver(name: str, solver: str, order: int, double: None) -> None:
    path, x = PATHS[name], normal(8, 2, 1, 1, seed=7)
    start, end = (float(path.time_of(torch.tensor([angle]))) for angle in (1.3, 0.3))
    wanted = exact(path, x, start, end)
    errors = []
    for steps in (32, 64, 128, 256):
        times = [start + (end - start) * i / steps for i in range(steps + 1)]
        errors.append(float((solve(predictor(path), x, times, solver) - wanted).abs().max()))
    assert slope(errors) == pytest.approx(order, abs=0.1)
    assert errors[-1] < (0.05 if order == 1 else 1e-3)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2)])
def test_the_order_of_a_solver_on_a_table(solver: str, order: int, double: None) -> None:
    """Of what reads alpha and sigma alone, also between entries, where the angle is linear."""
    test_the_global_order_of_a_solver("table", solver, order, double)


def test_slopes_of_a_table_hold_heun_at_two_parts_in_ten_thousand(double: None) -> None:
    """A velocity is the slope between two entries: Euler's error is first order, Heun's falls with the square of the
    step down to what a slope is off by, 1 / 1000 of it, and is there a thirtieth of Euler's or DDIM's."""
    path, x, errors = PATHS["table"], normal(8, 2, 1, 1, seed=7), {}
    for solver in ("euler", "ddim", "heun"):
        for steps in (5, 10, 20, 40):
            times = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
            moved = solve(predictor(path), x, times, solver) - exact(path, x, 0.9, times[-1])
            errors[solver, steps] = float(moved.square().mean().sqrt())
    assert errors["euler", 20] / errors["euler", 40] == pytest.approx(2, abs=0.1)
    assert errors["heun", 5] / errors["heun", 10] > 3
    assert errors["heun", 40] < min(errors["euler", 40], errors["ddim", 40]) / 10
    assert errors["heun", 40] < 4e-4


@pytest.mark.parametrize("name", ["flow", "trig"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("ddim", 2), ("heun", 3), ("dpm++2m", 3)])
def test_the_local_order_of_a_solver(name: str, solver: str, order: int, double: None) -> None:
    path, x = PATHS[name], normal(8, 2, 1, 1, seed=8)
    predict, errors = predictor(path), []
    for h in (0.02, 0.01, 0.005):
        t = 0.6
        before = predict(exact(path, x, t, t + h), torch.full((8,), t + h))
        now = predict(x, torch.full((8,), t))
        moved = SOLVERS[solver](predict, x, now, before, torch.full((8,), t - h))
        errors.append(float((moved - exact(path, x, t, t - h)).abs().max()))
    assert slope(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["flow", "table"])
def test_solvers_go_from_pure_noise_to_clean_data(name: str, solver: str) -> None:
    path, x = PATHS[name], torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(9))
    times = [1 - i / 100 for i in range(100)] + [0.0]
    drawn = solve(predictor(path), x, times, solver)
    # On the table the last hundredth of the time holds a large part of the angle, and that step is first order.
    second = 5e-3 if name == "flow" else 2e-2
    assert (drawn - exact(path, x, 1.0, 0.0)).abs().max() < (0.05 if solver in ("euler", "ddim") else second)


@pytest.mark.parametrize(
    ("solver", "name"),
    # Euler in the path's own time ends in x0 on the straight path alone.
    [("euler", "flow"), *itertools.product([solver for solver in SOLVERS if solver != "euler"], PATHS)],
)
def test_the_last_step_to_clean_data_is_x0(solver: str, name: str) -> None:
    path = PATHS[name]
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    predict, t = predictor(path), torch.full((4,), 0.25)
    now, before = predict(x, t), predict(x, torch.full((4,), 0.5))
    assert torch.allclose(SOLVERS[solver](predict, x, now, before, torch.zeros(4)), now.x0, atol=1e-6)


def test_calls_of_each_solver() -> None:
    counts = {}
    for solver in SOLVERS:
        seen: list[float] = []
        inner = predictor(FlowPath())

        def predict(x: Tensor, t: Tensor, seen: list[float] = seen, inner: Any = inner) -> Prediction:
            seen.append(float(t[0]))
            said: Prediction = inner(x, t)
            return said

        solve(predict, torch.zeros(1, 2, 1, 1), [1.0, 0.75, 0.5, 0.25, 0.0], solver)
        counts[solver] = len(seen)
    assert counts == {"euler": 4, "ddim": 4, "heun": 7, "dpm++2m": 4}


# --- guidance ----------------------------------------------------------------------------------------------------


def test_guidance_extrapolates_every_reading_alike() -> None:
    path, t = TrigPath(), torch.tensor([0.3, 0.7]).double()
    x_t = normal(2, 3, 1, 1, seed=1)
    outputs = normal(2, 3, 1, 1, seed=2), normal(2, 3, 1, 1, seed=3)
    for kind in KINDS:
        weak, strong = (path.read(output, kind, x_t, t) for output in outputs)
        for scale in (0.0, 1.0, 7.5, torch.tensor([2.0, 5.0]).double()):
            guided = path.read(extrapolate(*outputs, scale), kind, x_t, t)
            g = per_sample(scale, x_t) if isinstance(scale, Tensor) else scale
            # Reading is affine in the output: guiding outputs and guiding readings are one.
            for name in ("x0", "eps", "velocity"):
                low, high = getattr(weak, name), getattr(strong, name)
                assert torch.allclose(getattr(guided, name), low + g * (high - low), atol=1e-10)
            assert torch.allclose(guided.at(t), x_t, atol=1e-10)  # still a decomposition of x_t
    assert torch.allclose(extrapolate(*outputs, 1.0), outputs[1], atol=1e-12)


def test_a_guidance_interval_is_closed_at_both_ends() -> None:
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.81])
    assert in_interval(4.0, t, 0.2, 0.8).tolist() == [1, 4, 4, 4, 1]


def test_a_rescaled_output_is_the_pipelines() -> None:
    """diffusers' rescale_noise_cfg on the network's own output."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    weak, strong = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = extrapolate(weak, strong, 7.5)
    wanted = rescale_noise_cfg(weak + 7.5 * (strong - weak), strong, 0.7)
    torch.testing.assert_close(rescaled(guided, strong, 0.7), wanted)
