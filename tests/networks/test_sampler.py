"""A sampler draws what its stock scheduler draws, on exactly the grid it names, and says so where none has its grid."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampler_toy import DEVIATION, MEAN, Output, teacher_scheduler
from torch import Tensor, nn

from stepdistill.diffusion.path import EDMPath, FlowPath, Path, TablePath, TrigPath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler, times_of
from stepdistill.families.condition import Condition
from stepdistill.methods import find_method
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.system.travelling import travelling_module
from stepdistill.testing.toys import SHAPE, Gaussian, GaussianMap, ToyFamily, ToyTeacher, toy_student

TABLE = TablePath.from_alphas_cumprod(teacher_scheduler().alphas_cumprod)


def drawn_by(
    scheduler: Any, denoiser: Denoiser, noise: Tensor, steps: int, generator: torch.Generator | None
) -> Tensor:
    """diffusers' loop: network, then scheduler.step."""
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        n = float(timestep)
        t = torch.full((len(x),), (n + 1) / 1000 if isinstance(denoiser.path, TablePath) else n / 1000)
        output = denoiser.raw(x, t, Condition())
        more = {"generator": generator} if type(scheduler).__name__ == "LCMScheduler" else {}
        x = scheduler.step(output, timestep, x, **more, return_dict=False)[0]
    return x


def ours(sampler: Sampler, denoiser: Denoiser, noise: Tensor, generator: torch.Generator) -> Tensor:
    fresh: Callable[[int], Tensor] = lambda call: torch.randn(noise.shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        return sampler.draw(denoiser, noise, Condition(), fresh)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("renoise", [True, False])
def test_stock_schedulers_draw_the_same_on_a_table(renoise: bool, kind: Any, steps: int) -> None:
    prediction = {"eps": "epsilon", "v": "v_prediction"}[kind]
    teacher = teacher_scheduler(prediction_type=prediction)
    sampler = on_stock_grid(Sampler(uniform_times(steps), renoise), TABLE, teacher)
    scheduler = stock_scheduler(sampler, TABLE, teacher)
    assert type(scheduler).__name__ == ("LCMScheduler" if renoise or steps == 1 else "DDIMScheduler")
    denoiser = Denoiser(Output(TABLE, kind), TABLE, kind, ToyFamily())
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    own = ours(sampler, denoiser, noise, torch.Generator().manual_seed(1))
    theirs = drawn_by(scheduler, denoiser, noise, steps, torch.Generator().manual_seed(1)).detach()
    # DDIMScheduler steps by floor(1000 / 3) = 333 from 666 to the level of 333, and calls the network there at 332.
    assert (own - theirs).abs().max() < (2e-3 if steps == 3 and not renoise else 1e-5)
    assert own.std() > 0.02


@pytest.mark.parametrize("times", [(0.4,), (0.626,), (0.4, 0.2), (0.63, 0.42, 0.21)])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("renoise", [True, False])
def test_stock_schedulers_start_below_pure_noise(renoise: bool, kind: Any, times: tuple[float, ...]) -> None:
    """The scheduler has the first part of the teacher's table, by its config alone, and asks for unit noise."""
    prediction = {"eps": "epsilon", "v": "v_prediction"}[kind]
    teacher = teacher_scheduler(prediction_type=prediction)
    sampler = on_stock_grid(Sampler(times, renoise), TABLE, teacher)
    assert sampler.times == pytest.approx(times)
    made = stock_scheduler(sampler, TABLE, teacher)
    scheduler = type(made).from_config(json.loads(made.to_json_string()))
    last = round(1000 * times[0])
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod[:last])
    assert float(scheduler.init_noise_sigma) == 1
    denoiser = Denoiser(Output(TABLE, kind), TABLE, kind, ToyFamily())
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    own = ours(sampler, denoiser, noise, torch.Generator().manual_seed(1))
    theirs = drawn_by(scheduler, denoiser, noise, len(times), torch.Generator().manual_seed(1)).detach()
    assert [round(1000 * time) - 1 for time in sampler.times] == scheduler.timesteps.tolist()
    assert (own - theirs).abs().max() < 1e-5
    assert own.std() > 0.02
    if len(times) == 1:  # DMD2's convention: the noise itself is the network's input, x0 is read at that time
        t = torch.full((16,), times[0])
        alpha, sigma = (float(value[0]) for value in TABLE.alpha_sigma(t))
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        torch.testing.assert_close(own, MEAN + gain * (noise - alpha * MEAN), atol=1e-5, rtol=1e-5)


def test_a_table_with_zero_terminal_snr_is_cut_as_it_is() -> None:
    teacher = teacher_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path = TablePath.from_alphas_cumprod(teacher.alphas_cumprod)
    scheduler = stock_scheduler(Sampler((0.5,), True), path, teacher)
    assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod[:500])


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_tcd_scheduler_draws_the_same(gamma: float, kind: Any, steps: int) -> None:
    teacher = teacher_scheduler(prediction_type={"eps": "epsilon", "v": "v_prediction"}[kind])
    sampler = on_stock_grid(Sampler(uniform_times(4), True, grid=50, gamma=gamma), TABLE, teacher, steps)
    scheduler = stock_scheduler(sampler, TABLE, teacher)
    assert type(scheduler).__name__ == "TCDScheduler"
    denoiser = Denoiser(Output(TABLE, kind), TABLE, kind, ToyFamily())
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    own = ours(sampler, denoiser, noise, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        output = denoiser.raw(x, torch.full((len(x),), (float(timestep) + 1) / 1000), Condition())
        x = scheduler.step(output, timestep, x, eta=gamma, generator=generator, return_dict=False)[0]
    assert (own - x.detach()).abs().max() < 1e-5
    assert own.std() > 0.02


@pytest.mark.parametrize(
    "times", [(1.0,), (1.0, 0.5), (1.0, 0.75), (1.0, 0.75, 0.5, 0.25), (1.0, 0.9, 0.75, 0.5)]
)
def test_the_stock_scheduler_draws_the_same_on_a_flow_path(times: tuple[float, ...]) -> None:
    path = FlowPath()
    sampler = Sampler(times, False)
    scheduler = stock_scheduler(sampler, path, None)
    assert times_of(path, scheduler, len(times)) == pytest.approx(times, abs=1e-6)
    denoiser = Denoiser(Output(path, "velocity"), path, "velocity", ToyFamily())
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator()
    own = ours(on_stock_grid(sampler, path, None), denoiser, noise, generator)
    theirs = drawn_by(scheduler, denoiser, noise, len(times), generator).detach()
    assert (own - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 749, 499, 249]),
        (5, [999, 799, 599, 399, 199]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_grids_are_pinned_by_the_config_alone(steps: int, timesteps: list[int]) -> None:
    for renoise in (True, False):
        scheduler = stock_scheduler(Sampler(uniform_times(steps), renoise), TABLE, teacher_scheduler())
        again = type(scheduler).from_config(dict(scheduler.config))
        again.set_timesteps(steps)
        assert again.timesteps.tolist() == timesteps
    flow = stock_scheduler(Sampler(uniform_times(steps), False), FlowPath(), None)
    flow.set_timesteps(steps)
    assert flow.timesteps.tolist() == pytest.approx([1000 * (1 - i / steps) for i in range(steps)], abs=1e-3)


def test_what_is_evaluated_is_any_count_of_a_grids_student_and_the_own_of_others() -> None:
    assert Sampler((1.0, 0.5), True, grid=50).step_counts == (1, 2, 4, 8)
    assert Sampler((1.0, 0.75, 0.5), True).step_counts == (3,)


def test_a_grid_students_times_are_lcms_own() -> None:
    sampler = on_stock_grid(Sampler(uniform_times(4), True, grid=50), TABLE, teacher_scheduler())
    assert [round(1000 * time) for time in sampler.times] == [1000, 760, 500, 260]
    for steps, wanted in ((1, [1.0]), (2, [1.0, 0.5]), (4, [1.0, 0.76, 0.5, 0.26])):
        assert on_stock_grid(sampler, TABLE, teacher_scheduler(), steps).times == pytest.approx(wanted)
    assert sampler.step_counts == (1, 2, 4, 8)


def test_three_steps_land_on_whole_timesteps() -> None:
    for renoise, timesteps in ((True, [999, 666, 333]), (False, [999, 666, 332])):
        sampler = on_stock_grid(Sampler(uniform_times(3), renoise), TABLE, teacher_scheduler())
        assert [round(1000 * time) - 1 for time in sampler.times] == timesteps


@pytest.mark.parametrize(
    ("path", "times", "renoise"),
    [
        (TABLE, (1.0, 0.4), True),
        (TABLE, (1.0, 0.4), False),
        (TABLE, (0.6, 0.4), True),
        (TABLE, (1.0, 0.75, 0.5), True),
        (FlowPath(), (1.0, 0.8, 0.2), False),
    ],
)
def test_a_grid_that_no_stock_scheduler_has_is_refused(
    path: Path, times: tuple[float, ...], renoise: bool
) -> None:
    with pytest.raises(UserError, match=r"no stock diffusers scheduler draws in .*the nearest is") as caught:
        stock_scheduler(Sampler(times, renoise), path, teacher_scheduler())
    assert "\n" not in str(caught.value)


def test_what_has_no_stock_scheduler_is_refused() -> None:
    for times in ((0.9,), (0.9, 0.45)):
        with pytest.raises(UserError, match=r"starts at 0\.9, but diffusers' flow schedulers .*: set 1\.0"):
            stock_scheduler(Sampler(times, False), FlowPath(), None)
    with pytest.raises(UserError, match="EDMPath have no stock"):
        stock_scheduler(Sampler((1.0,), False), EDMPath(), None)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_call_that_forgets_the_step_count_raises(steps: int) -> None:
    for start in (1.0, 0.4):
        times = tuple(start * time for time in uniform_times(steps))
        scheduler = stock_scheduler(Sampler(times, True), TABLE, teacher_scheduler())
        with pytest.raises(ValueError, match="50"):
            scheduler.set_timesteps(50)


def test_the_exported_scheduler_keeps_the_teachers_schedule() -> None:
    teacher = teacher_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=True)
    for sampler in (Sampler((1.0, 0.5), True), Sampler((1.0, 0.5), False)):
        scheduler = stock_scheduler(sampler, TablePath.from_alphas_cumprod(teacher.alphas_cumprod), teacher)
        assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod)
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.clip_sample is False  # latents are not pixels
        assert scheduler.config.steps_offset == 1  # what Stable Diffusion pipelines insist on


def test_jumps_of_one_length_have_one_over_the_steps_and_others_none() -> None:
    """Up to the 1.5 thousandths by which a scheduler's own times may be off."""
    for steps in (1, 2, 3, 4, 8):
        assert Sampler(uniform_times(steps), False, two_times=True).gap == 1 / steps
    assert Sampler((1.0, 0.501), False, two_times=True).gap == 0.5
    for times in ((1.0, 0.6), (1.0, 0.4), (1.0, 0.498), (0.5,)):
        assert Sampler(times, False, two_times=True).gap is None


class Told(nn.Module):
    """Says the guidance that it is told as x0."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.one * cond["guidance"][:, None, None, None].expand_as(x)


def test_a_student_that_takes_its_guidance_is_told_it_at_every_call() -> None:
    student = toy_student(Told(), FlowPath(), "x0")
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(uniform_times(2), False, guidance=3.5)
    drawn = sampler.draw(student, noise, Condition(), lambda call: noise)
    torch.testing.assert_close(drawn, torch.full_like(noise, 3.5))


def test_walking_stops_at_the_asked_time() -> None:
    sampler = Sampler(uniform_times(4), False)
    path = FlowPath()
    student = toy_student(GaussianMap(path, MEAN, DEVIATION), path)
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    none: Callable[[int], Tensor] = lambda call: torch.zeros_like(noise)  # noqa: E731
    x = noise
    for calls in range(4):
        assert torch.equal(sampler.walk(student, noise, Condition(), none, calls), x)
        t, s = torch.full((4,), 1 - calls / 4), torch.full((4,), 0.75 - calls / 4)
        x = student.predict(x, t, Condition()).at(s)
    assert torch.equal(sampler.draw(student, noise, Condition(), none), x)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["consistency", "lcm", "scm", "tbcm"])
def test_consistency_students_of_a_flow_teacher_draw_the_data_in_any_steps(name: str, shift: float) -> None:
    """N(0.4, 0.6^2) by its exact consistency function: 1 % is four standard errors of the deviation. Going on with the
    noise that x0 leaves, as a flow map does, gives 0.82 in 2 steps and 1.09 in 8."""
    path, kind = FlowPath(shift), find_method(name)
    exact = lambda: GaussianMap(path, MEAN, DEVIATION)  # noqa: E731
    student = toy_student(exact(), path)
    method = kind(Copies(ToyTeacher(exact(), path), student), (1.0,), kind.Options())
    for steps in (1, 2, 4, 8):
        generator = torch.Generator().manual_seed(steps)
        noise = torch.randn(40_000, *SHAPE, generator=generator)
        drawn = ours(on_stock_grid(method.sampler(), path, None, steps), student, noise, generator)
        assert float(drawn.std()) == pytest.approx(DEVIATION, rel=0.01), steps
        assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.01), steps


@pytest.mark.parametrize("times", [(1.0, 0.5), (1.0, 0.9, 0.75, 0.5)])
def test_the_travelling_scheduler_draws_the_same_on_a_flow_path(times: tuple[float, ...]) -> None:
    """The trainer's pictures, each the same alone and in any batch, and no other for another start."""
    path = FlowPath()
    sampler = Sampler(times, True)
    scheduler = stock_scheduler(sampler, path, None)
    code = travelling_module("flow_consistency")
    assert type(scheduler) is code.FlowConsistencyScheduler
    assert times_of(path, scheduler, len(times)) == pytest.approx(times, abs=1e-6)
    denoiser = Denoiser(Output(path, "velocity"), path, "velocity", ToyFamily())
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    keys = code.keys_of(noise)
    with torch.no_grad():
        own = on_stock_grid(sampler, path, None).draw(
            denoiser, noise, Condition(), lambda call: code.noise_after(keys, call, noise)
        )
        theirs, reverse = (drawn_by(scheduler, denoiser, x, len(times), None) for x in (noise, noise.flip(0)))
        alone = [drawn_by(scheduler, denoiser, row[None], len(times), None) for row in noise]
    assert (own - theirs).abs().max() < 1e-5
    torch.testing.assert_close(theirs, reverse.flip(0))
    torch.testing.assert_close(theirs, torch.cat(alone))


def test_the_travelling_noise_is_standard_normal_and_fresh_at_every_call() -> None:
    code = travelling_module("flow_consistency")
    start = torch.randn(500, 8, 8, generator=torch.Generator().manual_seed(0))
    keys = code.keys_of(start)
    noises = [start, *(code.noise_after(keys, call, start) for call in (0, 1))]
    for noise in noises:
        assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
        assert float(noise.std()) == pytest.approx(1, abs=0.02)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(float((noises[a] * noises[b]).mean())) < 4 / start.numel() ** 0.5
    assert abs(float((noises[1] * noises[1].roll(1, 0)).mean())) < 4 / start.numel() ** 0.5


def test_one_step_without_a_grid_takes_no_noise_and_needs_no_code() -> None:
    assert (
        type(stock_scheduler(Sampler((1.0,), True), FlowPath(), None)).__name__
        == "FlowMapEulerDiscreteScheduler"
    )


@pytest.mark.parametrize(
    ("grid", "near"), [(64, "50 or 100"), (30, "25 or 40"), (16, "10 or 20"), (12, "10 or 20")]
)
@pytest.mark.parametrize("name", ["lcm", "tcd", "tscd"])
def test_a_grid_that_does_not_divide_the_table_is_refused(name: str, grid: int, near: str) -> None:
    """LCMScheduler and TCDScheduler would start drawings at 959, 989, 991 and 995."""
    kind = find_method(name)
    more = {"segments": (1,)} if name == "tscd" else {}
    teacher = ToyTeacher(Gaussian(TABLE, MEAN, DEVIATION), TABLE)
    student = toy_student(Gaussian(TABLE, MEAN, DEVIATION), TABLE)
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(grid=grid, **more))
    with pytest.raises(UserError, match=f"grid of {grid} .*divisor, {near}$") as caught:
        stock_scheduler(method.sampler(), TABLE, teacher_scheduler())
    assert "\n" not in str(caught.value)
    allowed = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(grid=40, **more))
    for steps in (1, 2, 4, 8):
        assert on_stock_grid(allowed.sampler(), TABLE, teacher_scheduler(), steps).times[0] == 1


@pytest.mark.parametrize(("path", "times"), [(TABLE, (1.0, 0.4)), (FlowPath(), (1.0, 0.9, 0.2))])
def test_times_that_the_scheduler_of_a_grid_would_replace_are_refused(
    path: Path, times: tuple[float, ...]
) -> None:
    with pytest.raises(UserError, match=r"student\.times is .*, which no .* the nearest is"):
        stock_scheduler(Sampler(times, True, grid=50), path, teacher_scheduler())


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()], ids=["flow", "trig"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_sampling_of_the_exact_map_draws_the_data(path: Path, steps: int) -> None:
    count = 40_000
    student = toy_student(GaussianMap(path, MEAN, DEVIATION), path)
    generator = torch.Generator().manual_seed(steps)
    noise = torch.randn(count, *SHAPE, generator=generator)
    drawn = ours(Sampler(uniform_times(steps), True), student, noise, generator)
    numbers = drawn.numel()
    # Four standard errors of a mean and of a variance.
    assert abs(float(drawn.mean()) - MEAN) < 4 * DEVIATION / numbers**0.5
    assert abs(float(drawn.var()) - DEVIATION**2) < 4 * DEVIATION**2 * (2 / numbers) ** 0.5
