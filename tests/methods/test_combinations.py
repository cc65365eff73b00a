"""Every output kind on every kind of schedule: what exact students draw with the exported scheduler, and learn.

eps, v and x0 on Stable Diffusion's table; v and x0 on the same with zero terminal SNR, where an eps says nothing at
pure noise; velocities on a flow path, its times shifted or not. Networks are closed forms, expected numbers are worked
out from diffusers' own table of alphas.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from sampler_toy import Output, teacher_scheduler
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath, Path, TablePath
from stepdistill.diffusion.solvers import Predict, solve
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.families.condition import Condition
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd import DMD
from stepdistill.methods.lcm import LCM
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.scheduler_path import PREDICTION_TYPES, path_of
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianMap,
    Mixture,
    ToyFamily,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

MEAN, DEVIATION = 0.4, 0.6
SCHEDULES: dict[str, dict[str, Any]] = {
    "table": {},
    "zero": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
PAIRS = [
    ("table", "eps"), ("table", "v"), ("table", "x0"), ("zero", "v"), ("zero", "x0"), ("flow 1", "velocity"),
    ("flow 3", "velocity"),
]  # fmt: skip
each_pair = pytest.mark.parametrize(("schedule", "kind"), PAIRS)


def of(schedule: str, kind: Any) -> tuple[Any, Path]:
    """The teacher's scheduler and its path."""
    if schedule in SCHEDULES:
        scheduler = teacher_scheduler(prediction_type=PREDICTION_TYPES[kind], **SCHEDULES[schedule])
        path, output = path_of(scheduler)
        assert output == kind
        return scheduler, path
    return None, FlowPath(float(schedule.split()[1]))


class As(Output):
    """A closed-form x0 as a network of any output kind."""

    def __init__(self, x0: nn.Module, path: Path, kind: Any) -> None:
        super().__init__(path, kind)
        self.x0 = x0
        self.scale = nn.Parameter(torch.ones(()))  # a network has weights, by whose type it is called


def drawn(
    sampler: Sampler, path: Path, net: nn.Module, kind: Any, teacher: Any, count: int, dtype: torch.dtype
) -> Tensor:
    """diffusers' loop with the sampler's scheduler, made anew from its config, in steps of ``dtype``."""
    made = stock_scheduler(sampler, path, teacher)
    scheduler = type(made).from_config(json.loads(made.to_json_string()))
    scheduler.set_timesteps(sampler.steps)
    denoiser = Denoiser(net.requires_grad_(False), path, kind, ToyFamily(path))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *SHAPE, generator=generator).to(dtype)
    more: dict[str, Any] = {"generator": generator} if type(scheduler).__name__ == "LCMScheduler" else {}
    for timestep in scheduler.timesteps:
        n = float(timestep)
        t = torch.full((count,), (n + 1) / path.steps if isinstance(path, TablePath) else n / 1000)
        output = denoiser.raw(x, t, Condition()).to(dtype)
        x = scheduler.step(output, timestep, x, **more, return_dict=False)[0]
        assert x.dtype == dtype
    return x.float()


def levels(scheduler: Any, schedule: str, steps: int) -> list[tuple[float, float]]:
    """(alpha, sigma) of the calls, by the teacher's table or by t = s u / (1 + (s - 1) u), and of clean data."""
    if scheduler is not None:
        alphas = [float(scheduler.alphas_cumprod[1000 - 1000 * i // steps - 1]) for i in range(steps)]
        return [(a**0.5, (1 - a) ** 0.5) for a in alphas] + [(1.0, 0.0)]
    s, u = float(schedule.split()[1]), [1 - i / steps for i in range(steps)]
    times = [s * each / (1 + (s - 1) * each) for each in u]
    return [(1 - t, t) for t in times] + [(1.0, 0.0)]


def moments(net: type[Gaussian], renoise: bool, at: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and deviation of what is drawn from N(0, 1): every step is affine, x0 = mu + gain (x - alpha mu)."""
    mean, variance = 0.0, 1.0
    for i, (alpha, sigma) in enumerate(at[:-1]):
        spread = alpha**2 * DEVIATION**2 + sigma**2
        gain = DEVIATION / spread**0.5 if net is GaussianMap else alpha * DEVIATION**2 / spread
        clean, slope = MEAN + gain * (mean - alpha * MEAN), gain
        if i == len(at) - 2:
            return clean, (slope**2 * variance) ** 0.5
        alpha_s, sigma_s = at[i + 1]
        if renoise:
            mean, variance = alpha_s * clean, alpha_s**2 * slope**2 * variance + sigma_s**2
        else:  # alpha_s x0 + sigma_s eps with eps = (x - alpha x0) / sigma
            kept = sigma_s / sigma
            mean = alpha_s * clean + kept * (mean - alpha * clean)
            variance = (kept + (alpha_s - kept * alpha) * slope) ** 2 * variance
    raise AssertionError("no steps")


DRAWINGS = [(*pair, steps, torch.float32) for pair in PAIRS for steps in (1, 2, 4)]
DRAWINGS += [(*pair, 2, torch.bfloat16) for pair in PAIRS if pair[1] != "eps"]
"""And once in bf16; from an eps of 8 bits x0 would be 1 / alpha = 14 times as coarse."""


@pytest.mark.parametrize(("schedule", "kind", "steps", "dtype"), DRAWINGS)
def test_exported_schedulers_draw_a_gaussian_with_the_mean_and_deviation_of_their_steps(
    schedule: str, kind: Any, steps: int, dtype: torch.dtype
) -> None:
    """The exact consistency function with fresh noise between steps: data of N(0.4, 0.6^2), but for what a table's end
    leaves of them in pure noise. And the exact denoiser, whose few steps are off, by as much as theirs are."""
    teacher, path = of(schedule, kind)
    count = 20_000 if teacher else 5000  # the noise that travels belongs to each sample, and takes time
    for net, renoise in ((GaussianMap, True), (Gaussian, False)):
        sampler = on_stock_grid(Sampler(schedule_times(path, steps), renoise), path, teacher)
        wanted = moments(net, renoise, levels(teacher, schedule, steps))
        x = drawn(sampler, path, As(net(path, MEAN, DEVIATION), path, kind), kind, teacher, count, dtype)
        assert float(x.mean()) == pytest.approx(wanted[0], abs=0.02), (net, wanted)
        assert float(x.std()) == pytest.approx(wanted[1], rel=0.02, abs=1e-4), (net, wanted)
        if net is GaussianMap:
            assert wanted == pytest.approx((MEAN, DEVIATION), abs=0.03)


class MixtureMap(Mixture):
    """The exact consistency function of the mixture: its ODE solved from (x, t), on the straight path."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = (float(value[0]) for value in self.path.alpha_sigma(t))
        flow, first = FlowPath(), sigma / (alpha + sigma)
        exact = Mixture(flow, deviation=self.deviation)
        predict: Predict = lambda x, t: flow.read(exact(x, t, cond), "x0", x, t)  # noqa: E731
        return solve(predict, x / (alpha + sigma), [first * (1 - i / 24) for i in range(25)], "heun")


@pytest.mark.parametrize("steps", [1, 2, 4])
@each_pair
def test_exported_schedulers_draw_the_modes_of_a_mixture(schedule: str, kind: Any, steps: int) -> None:
    """A quarter of the samples in each of four modes, of deviation 0.15, from the mixture's exact consistency function
    at any number of steps."""
    teacher, path = of(schedule, kind)
    net = MixtureMap(path)
    sampler = on_stock_grid(Sampler(schedule_times(path, steps), True), path, teacher)
    x = drawn(sampler, path, As(net, path, kind), kind, teacher, 2000, torch.float32).flatten(1)
    away, mode = torch.cdist(x, net.centres).min(1)  # type: ignore[arg-type]
    assert float((away.square().mean() / 2).sqrt()) == pytest.approx(0.15, abs=0.02)
    assert torch.bincount(mode, minlength=4).tolist() == pytest.approx([500] * 4, abs=80)


@each_pair
def test_consistency_losses_vanish_with_the_step_at_the_exact_map(schedule: str, kind: Any) -> None:
    """Of LCM, whose step is DDIM, and of CM with Heun: a residual of O(h^2) and O(h^3) on any schedule, from any
    output, and none of either order beside the exact map."""
    _, path = of(schedule, kind)
    teacher = ToyTeacher(As(Gaussian(path, MEAN, DEVIATION), path, kind), path, kind)
    batch = toy_batch(256, pairs=lambda z: MEAN + DEVIATION * z)

    def residual(method: Any, net: nn.Module, **options: Any) -> float:
        student = toy_student(As(net, path, kind), path, kind)
        made = method(Copies(teacher, student), (1.0,), method.Options(**{"guidance": 1.0, **options}))
        return float(loss_of(made, "student", batch)[1]["residual"])

    exact, beside = GaussianMap(path, MEAN, DEVIATION), GaussianMap(path, MEAN, DEVIATION + 0.2)
    for method, order, options in ((LCM, 2, {}), (Consistency, 3, {"rho": 3.0})):
        coarse, fine = (residual(method, exact, grid=grid, **options) for grid in (40, 80))
        if method is Consistency and isinstance(path, TablePath):
            assert (
                coarse < 3e-4
            )  # what LCMScheduler's scalings change near timestep 0, and the table's entries
        else:
            assert coarse / fine == pytest.approx(2**order, rel=0.35), (method, coarse, fine)
        assert residual(method, beside, grid=80, **options) > 3 * fine


@each_pair
def test_the_gradient_of_dmd_is_the_closed_form(schedule: str, kind: Any) -> None:
    """For a student N(m, s^2) and an exact fake network under a teacher N(mu, s^2): (m - mu) sigma^2 / V over
    mean|x - x0_real| at every sample, whatever the networks return and wherever their times lie."""
    _, path = of(schedule, kind)
    shift, batch = 0.3, toy_batch(256)

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(MEAN + shift))

        def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            return self.shift + DEVIATION * x

    teacher = ToyTeacher(As(Gaussian(path, MEAN, DEVIATION), path, kind), path, kind)
    generator = Generator()
    student = toy_student(As(generator, path, kind), path, kind)
    method = DMD(Copies(teacher, student), (1.0,), DMD.Options(guidance=1.0))
    method.fake.net = As(Gaussian(path, MEAN + shift, DEVIATION), path, kind).requires_grad_(False)
    loss_of(method, "student", batch)[0].backward()  # type: ignore[no-untyped-call]
    t = path.shifted(batch.draws.uniform("score t", 0.02, 0.98))
    alpha, sigma = path.alpha_sigma(t)
    x = MEAN + shift + DEVIATION * batch.noise
    x_t = path.noised(x, batch.draws.normal("score eps", SHAPE), t)
    real = Gaussian(path, MEAN, DEVIATION)(x_t, t, batch.cond)
    expected = shift * sigma**2 / (alpha**2 * DEVIATION**2 + sigma**2) / (x - real).abs().flatten(1).mean(1)
    assert float(generator.shift.grad) == pytest.approx(float(expected.mean()), rel=2e-3)
