"""Which scheduler a student travels with, and what its config says; tests/networks/test_sampler.py draws with them."""

from __future__ import annotations

from typing import Any

import pytest
from sampler_toy import teacher_scheduler
from toy import ToyFamily

from stepdistill.diffusion.path import FlowPath, Path, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import check_sampler, on_stock_grid, stock_scheduler
from stepdistill.networks.sampler import Sampler

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
