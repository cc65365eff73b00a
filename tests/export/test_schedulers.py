"""Which scheduler a student travels with, and what its config says; tests/networks/test_sampler.py draws with them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sampler_toy import teacher_scheduler

from stepdistill.diffusion.path import FlowPath, Path, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import (
    check_sampler,
    clipping_remark,
    on_stock_grid,
    stock_scheduler,
    times_of,
)
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.scheduler_path import path_of
from stepdistill.testing.toys import ToyFamily

TABLE = TablePath.from_alphas_cumprod(teacher_scheduler().alphas_cumprod)


class KeepsItsGenerator(ToyFamily):
    """As all families do whose ``passes`` does not say otherwise."""


class HandsItOn(ToyFamily):
    passes = frozenset({"generator"})


@pytest.mark.parametrize(
    ("steps", "renoise", "path", "family", "refused"),
    [
        (2, True, TABLE, KeepsItsGenerator(), True),
        (3, True, TABLE, KeepsItsGenerator(), True),
        (1, True, TABLE, KeepsItsGenerator(), False),
        (2, False, TABLE, KeepsItsGenerator(), False),
        (2, True, TABLE, HandsItOn(), False),
        (2, True, FlowPath(), KeepsItsGenerator(), False),  # whose travelling scheduler has noise of its own
    ],
)
def test_fresh_noise_needs_a_generator_that_reaches_the_scheduler(
    steps: int, renoise: bool, path: Path, family: ToyFamily, refused: bool
) -> None:
    sampler = Sampler(uniform_times(steps), renoise)
    if refused:
        with pytest.raises(UserError, match="could not be reproduced from a seed"):
            check_sampler(sampler, path, family)
    else:
        check_sampler(sampler, path, family)


def test_a_whole_table_keeps_the_teachers_schedule_by_name() -> None:
    """No list of betas where all of the table is used, and what a teacher's scheduler does not say is off."""
    from diffusers import PNDMScheduler

    pndm = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert "rescale_betas_zero_snr" not in pndm.config
    for sampler in (Sampler((1.0,), True), Sampler((1.0, 0.5), False), Sampler((1.0, 0.5), True, grid=50)):
        config = stock_scheduler(sampler, TABLE, pndm).config
        assert config.trained_betas is None and config.num_train_timesteps == 1000
        assert config.rescale_betas_zero_snr is False and config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize(("grid", "original"), [(50, 50), (None, 1000)])
def test_tcds_grid_is_the_students_or_the_whole_table(grid: int | None, original: int) -> None:
    sampler = Sampler((1.0, 0.5), True, grid=grid, gamma=0.3)
    assert stock_scheduler(sampler, TABLE, teacher_scheduler()).config.original_inference_steps == original


@pytest.mark.parametrize(
    ("start", "said"), [(0.999, None), (0.998, "starts at 0.998"), (0.9, "starts at 0.9")]
)
def test_a_flow_student_starts_at_pure_noise_up_to_rounding(start: float, said: str | None) -> None:
    sampler = Sampler((start,), False)
    if said is None:
        assert on_stock_grid(sampler, FlowPath(), None).times == (1.0,)
    else:
        with pytest.raises(UserError, match=said):
            stock_scheduler(sampler, FlowPath(), None)


@pytest.mark.parametrize(
    ("second", "grid", "fits"),
    [(0.501, None, True), (0.502, None, False), (0.51, 50, True), (0.53, 50, False)],
)
def test_times_may_be_off_by_a_timestep_and_half_and_on_a_grid_by_one_of_it(
    second: float, grid: int | None, fits: bool
) -> None:
    sampler = Sampler((1.0, second), True, grid=grid)
    if fits:
        assert on_stock_grid(sampler, TABLE, teacher_scheduler()).times[1] == pytest.approx(0.5, abs=0.021)
    else:
        with pytest.raises(UserError, match="which no stock diffusers scheduler draws in 2 steps"):
            stock_scheduler(sampler, TABLE, teacher_scheduler())


@pytest.mark.parametrize(("grid", "near"), [(3, "2 or 4"), (700, "500 or 1000"), (1500, "1000")])
def test_the_nearest_divisors_are_named(grid: int, near: str) -> None:
    scheduler: Any = teacher_scheduler()
    with pytest.raises(UserError, match=f"divisor, {near}$"):
        stock_scheduler(Sampler((1.0,), True, grid=grid), TABLE, scheduler)


EULER, MATCH, OWN = (
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowConsistencyScheduler",
)


@pytest.mark.parametrize(
    ("passes", "times", "grid", "kind"),
    [
        ("", uniform_times(4), None, EULER),
        ("sigmas", uniform_times(4), 50, EULER),
        ("sigmas mu", (1.0, 6 / 7, 0.6), 50, MATCH),
        ("mu", (1.0,), None, MATCH),
        ("mu", (1.0, 0.7), None, MATCH),  # its last step stretched to end at 0.7
        ("mu", uniform_times(4), None, MATCH),
        ("mu", uniform_times(4), 50, OWN),  # which would end there at any number of steps
        ("mu", (1.0, 6 / 7, 0.6), None, OWN),
        ("sigmas timesteps mu", (1.0,), None, MATCH),
        ("sigmas timesteps mu", uniform_times(2), None, OWN),  # it would be told 1000 and 1
        ("sigmas timesteps mu", (1.0,), 50, OWN),
        ("own sigmas", (1.0,), None, OWN),
    ],
)
def test_a_flow_student_travels_with_the_first_scheduler_that_has_its_grid(
    passes: str, times: tuple[float, ...], grid: int | None, kind: str
) -> None:
    """From what pipelines pass: a number of steps alone, sigmas, a mu without any, and timesteps for many steps."""
    names = frozenset(["own sigmas"] if passes == "own sigmas" else passes.split())
    path = FlowPath(3.0, clock_shift=2.0)
    scheduler: Any = stock_scheduler(Sampler(times, False, grid=grid), path, None, names)
    assert type(scheduler).__name__ == kind
    assert times_of(path, scheduler, len(times), names) == pytest.approx(times, abs=1e-6)
    if kind == OWN:
        assert scheduler.config.clock_shift == 2.0 and not scheduler.config.renoise
        told = [1000 * t / (2 - t) for t in times]
        assert scheduler.timesteps.tolist() == pytest.approx(told, abs=1e-3)


def test_the_travelling_scheduler_takes_eulers_steps_where_there_is_no_fresh_noise() -> None:
    own: Any = stock_scheduler(Sampler((1.0, 6 / 7, 0.6), False), FlowPath(), None, frozenset({"mu"}))
    euler: Any = stock_scheduler(Sampler((1.0, 6 / 7, 0.6), False), FlowPath(), None)
    x = y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    own.set_timesteps(sigmas=[1.0, 0.5, 0.1], mu=0.5)
    euler.set_timesteps(3)
    for i, t in enumerate(own.timesteps):
        x = own.step(x.sin() + i, t, x, return_dict=False)[0]
        y = euler.step(y.sin() + i, t, y, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("renoise", [True, False])
def test_the_travelling_scheduler_of_a_negated_velocity_counts_from_the_data(renoise: bool) -> None:
    """As FlowMatchEulerDiscreteScheduler does under invert_sigmas; the states are the same."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sampler, path, negated = Sampler((1.0, 6 / 7, 0.6), renoise), FlowPath(), frozenset({"negated"})
    plain: Any = stock_scheduler(sampler, path, None, frozenset({"own sigmas"}))
    own: Any = stock_scheduler(sampler, path, None, frozenset({"own sigmas", "negated"}))
    stock: Any = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert times_of(path, own, 3, negated) == pytest.approx(sampler.times)
    stock.set_timesteps(sigmas=list(sampler.times))
    plain.set_timesteps(3)
    own.set_timesteps(3)
    assert torch.allclose(own.timesteps.float(), stock.timesteps, atol=1e-3)
    assert torch.allclose(own.sigmas.float(), stock.sigmas, atol=1e-6)
    x = y = z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for told, counted in zip(plain.timesteps, own.timesteps, strict=True):
        y = plain.step(x.sin(), told, y, return_dict=False)[0]
        z = stock.step(-x.sin(), counted, z, return_dict=False)[0]
        x = own.step(-x.sin(), counted, x, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-6) and (renoise or torch.allclose(x, z, atol=1e-5))


TABLES = (
    "CogVideoXDDIM CogVideoXDPM DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep "
    "DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LCM "
    "LMSDiscrete PNDM SASolver TCD UniPCMultistep"
).split()


@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "zero-snr"])
@pytest.mark.parametrize("name", TABLES)
def test_a_students_table_is_its_teachers_up_to_where_it_ends(name: str, rescaled: bool) -> None:
    """CogVideoX's schedulers rescale their alphas and not their betas."""
    import diffusers

    kind: Any = getattr(diffusers, f"{name}Scheduler")
    own = inspect.signature(kind.__init__).parameters
    if rescaled and "rescale_betas_zero_snr" not in own:
        pytest.skip("it has no such key")
    config = {"rescale_betas_zero_snr": True} if rescaled else {}
    for schedule in ("scaled_linear", "sigmoid", "laplace"):
        for shift in (1.0, 3.0) if "snr_shift_scale" in own else (None,):
            more: dict[str, Any] = {} if shift is None else {"snr_shift_scale": shift}
            try:
                teacher = kind(beta_schedule=schedule, prediction_type="v_prediction", **config, **more)
            except NotImplementedError:
                assert schedule != "scaled_linear"
                continue
            path, _ = path_of(teacher)
            for sampler in (
                Sampler((1.0,), True),
                Sampler((0.4,), True),
                Sampler((0.8, 0.4), True),
                Sampler((0.8, 0.4), False),
                Sampler((0.8, 0.4), True, gamma=0.3),
            ):
                made: Any = stock_scheduler(sampler, path, teacher)
                last = round(sampler.times[0] * 1000)
                assert len(made.alphas_cumprod) == last
                off = (made.alphas_cumprod.double() - teacher.alphas_cumprod[:last].double()).abs().max()
                assert off < 1e-6, (schedule, more, sampler)


def test_a_student_answers_pipelines_that_ask_for_a_learned_variance() -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    for sampler in (Sampler((1.0, 0.5), True), Sampler((1.0, 0.5), False)):
        learned = DDPMScheduler(variance_type="learned_range")
        made: Any = stock_scheduler(sampler, TABLE, learned)
        assert type(made).from_config(made.config).config.variance_type == "fixed_small"
        assert "variance_type" not in stock_scheduler(sampler, TABLE, DDIMScheduler()).config


def test_a_teacher_that_clips_is_told_of() -> None:
    """Its student does not, and whoever reads the numbers should know."""
    plain = teacher_scheduler()
    told = clipping_remark(type(plain).from_config(plain.config, clip_sample=True))
    assert told is not None and told.startswith(
        f"the teacher's {type(plain).__name__} clips its clean predictions"
    )
    assert clipping_remark(type(plain).from_config(plain.config, clip_sample=False)) is None
