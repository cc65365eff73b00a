"""Chooses an exported student's scheduler: the one of diffusers that draws as its sampler does, or one that travels."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from stepdistill.diffusion.path import FlowPath, TablePath, TrigPath
from stepdistill.diffusion.path import Path as NoisePath
from stepdistill.diffusion.shift import counts_up, shifted
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.plain_calls import of_count
from stepdistill.networks.sampler import Sampler
from stepdistill.system.travelling import travelling_module

ALLOWED = 1.5e-3
"""How far a time of a scheduler may be from the student's."""


def check_sampler(sampler: Sampler, path: NoisePath, family: Family) -> None:
    """Refuses a sampler with which the family's pipeline does not draw one picture from one seed.

    Raises:
        UserError: for fresh noise between steps on a table where the pipeline keeps its generator to itself.
    """
    own = isinstance(path, FlowPath)  # the scheduler that travels there has noise of its own
    if sampler.renoise and sampler.steps > 1 and not (own or "generator" in family.passes):
        raise UserError(
            f"a {sampler.steps}-step student that takes fresh noise between steps could not be reproduced from a seed: "
            f"{', '.join(family.pipelines)} hands its generator to no scheduler. Set student.times=[1.0], or the "
            "method's options.renoise=false where it has that option"
        )


def stock_scheduler(
    sampler: Sampler, path: NoisePath, teacher_scheduler: Any, passes: frozenset[str] = frozenset()
) -> Any:
    """The scheduler that draws as this sampler does, its grid pinned by its config alone, so that the pipeline's call
    needs no more than the number of steps: a stock one where one does, see :func:`_flow_scheduler`.

    Args:
        sampler: how the student draws.
        path: the student's.
        teacher_scheduler: whose table is kept.
        passes: what the pipeline hands to its scheduler, see ``Family.passes``.

    Raises:
        UserError: when no scheduler has this grid.
    """
    from diffusers import DDIMScheduler, LCMScheduler, SCMScheduler, TCDScheduler

    scheduler: Any
    if isinstance(path, FlowPath):
        if sampler.times[0] < 1 - 1.5e-3:
            raise UserError(
                f"student.times starts at {sampler.times[0]:g}, but diffusers' flow schedulers call a network first "
                "at pure noise: set 1.0"
            )
        scheduler = _flow_scheduler(sampler, path, passes)
    elif isinstance(path, TablePath):
        keep = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "prediction_type",
        )
        config = {key: teacher_scheduler.config[key] for key in keep}
        config["rescale_betas_zero_snr"] = teacher_scheduler.config.get("rescale_betas_zero_snr", False)
        # Schedulers call a network first at the end of their table, so it ends there.
        last = path.steps if sampler.grid else round(sampler.times[0] * path.steps)
        if last < path.steps or not _makes_table(config, teacher_scheduler.alphas_cumprod):
            betas = _betas_of(teacher_scheduler)[:last]
            config |= {"num_train_timesteps": last, "trained_betas": betas, "rescale_betas_zero_snr": False}
        config["prediction_type"] = sampler.prediction_type or config["prediction_type"]
        config["clip_sample"] = False
        # Read by neither scheduler on these grids; Stable Diffusion pipelines rewrite any other value, and warn.
        config["steps_offset"] = 1
        if sampler.gamma is not None:
            scheduler = TCDScheduler(**config, original_inference_steps=sampler.grid or last)
        elif sampler.renoise or sampler.steps == 1:
            uniform = sampler.steps if last % sampler.steps == 0 else last
            # With as many original steps as the student has, a call that forgets num_inference_steps (and so asks
            # for 50) raises instead of drawing on a grid the student never saw.
            scheduler = LCMScheduler(**config, original_inference_steps=sampler.grid or uniform)
        else:
            scheduler = DDIMScheduler(**config, timestep_spacing="trailing", set_alpha_to_one=True)
        if (
            "variance_type" in teacher_scheduler.config
        ):  # some pipelines ask every scheduler whether it is learned
            scheduler.register_to_config(variance_type="fixed_small")
    elif isinstance(path, TrigPath):
        if sampler.steps > 1 and not sampler.renoise:
            raise UserError(
                f"a student of {sampler.steps} steps without fresh noise between them has no scheduler in this "
                "pipeline: set student.times=[1.0], or take a method with fresh noise (dmd, lcm, scm)"
            )
        scheduler = SCMScheduler(sigma_data=teacher_scheduler.config.sigma_data)
    else:
        raise UserError(f"students on a {type(path).__name__} have no stock diffusers scheduler")
    _check_grid(sampler, path, scheduler, passes)
    return scheduler


def clipping_remark(scheduler: Any) -> str | None:
    """What to tell of a teacher whose scheduler clips clean predictions: its student is trained and drawn without."""
    name = next((key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)), None)
    if name is None:
        return None
    return (
        f"the teacher's {type(scheduler).__name__} clips its clean predictions ({name}), and the student is trained "
        "and draws without: where that clips much, the two differ. Latents should not be clipped: set it to false in "
        "the teacher's scheduler"
    )


def _flow_scheduler(sampler: Sampler, path: FlowPath, passes: frozenset[str]) -> Any:
    """The first stock scheduler that has the student's grid from what the pipeline passes, else the one of
    ``pipelines/flow_consistency.py``, which travels along: for fresh noise between steps, too.

    FlowMapEulerDiscreteScheduler makes the grid from the number of steps, and takes no ``mu``.
    FlowMatchEulerDiscreteScheduler takes one and, without dynamic shifting, ignores it; from a number of steps it would
    waste the last one, unless the pipeline passes sigmas, or its grid is stretched to end where the student's does.
    """
    from diffusers import FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    shift, last = _shift(sampler, path), sampler.times[-1]
    own = partial(
        travelling_module("flow_consistency").FlowConsistencyScheduler,
        shift=shift,
        clock_shift=path.clock_shift,
        invert_sigmas="negated" in passes,
    )
    if sampler.renoise and sampler.step_counts != (1,):
        # The stock ones that take fresh noise (FlowMatchLCM, FlowMatchEuler with stochastic_sampling) draw it
        # from the global generator in SD3's pipeline, and their grid ends at 1/1000.
        return own()
    stock: list[Any] = [] if "mu" in passes else [FlowMapEulerDiscreteScheduler(shift=shift)]
    stock.append(FlowMatchEulerDiscreteScheduler(shift=shift))
    if 0 < last < 1 and sampler.step_counts == (sampler.steps,) and "sigmas" not in passes:
        stock.append(FlowMatchEulerDiscreteScheduler(shift_terminal=last))
    if passes & {"own sigmas", "negated"}:
        stock.clear()
    for scheduler in stock:
        if all(_near(times_of(path, scheduler, n, passes), _even(shift, n)) for n in sampler.step_counts):
            return scheduler
    return own(renoise=False)


def _even(shift: float, steps: int) -> tuple[float, ...]:
    """The grid 1, 1 - 1/n ... 1/n after a shift."""
    return tuple(shifted(time, shift) for time in uniform_times(steps))


def _near(times: Sequence[float], wanted: Sequence[float], allowed: float = ALLOWED) -> bool:
    return max(abs(a - b) for a, b in zip(times, wanted, strict=True)) <= allowed


def _makes_table(config: dict[str, Any], table: Tensor) -> bool:
    """Whether these keys of a teacher's config make its table of alphas: CogVideoX shifts the signal-to-noise ratio of
    its own by a further key, and DDPM has schedules of betas that no scheduler of a student has."""
    from diffusers import DDIMScheduler

    try:
        made = cast(Any, DDIMScheduler(**config))
    except NotImplementedError:
        return False
    return bool((table.double() - made.alphas_cumprod).abs().max() < 1e-6)


def _betas_of(scheduler: Any) -> list[float]:
    """The betas that make a teacher's table of alphas: its own, but where it rescales the table alone (CogVideoX)."""
    table, betas = scheduler.alphas_cumprod.double(), scheduler.betas
    if (table - (1 - betas.double()).cumprod(0)).abs().max() < 1e-6:
        return cast(list[float], betas.tolist())
    return [float(1 - table[0]), *(1 - table[1:] / table[:-1]).tolist()]


def _shift(sampler: Sampler, path: FlowPath) -> float:
    """The s of the time shift that maps the uniform grid to these times; that of the path for one step."""
    if sampler.steps == 1:
        return path.shift
    t, u = sampler.times[-1], 1 / sampler.steps
    return round(t * (1 - u) / (u * (1 - t)), 6)


def _check_grid(sampler: Sampler, path: NoisePath, scheduler: Any, passes: frozenset[str]) -> None:
    allowed = ALLOWED
    if sampler.grid and isinstance(path, TablePath):
        if path.steps % sampler.grid:
            divisors = [n for n in range(2, path.steps + 1) if path.steps % n == 0]
            above = bisect(divisors, sampler.grid)
            near = divisors[max(above - 1, 0) : above + 1]
            raise UserError(
                f"a grid of {sampler.grid} times does not divide the teacher's {path.steps} timesteps, so drawings "
                f"would not start at the last of them: set options.grid to a divisor, {' or '.join(map(str, near))}"
            )
        allowed += 1 / sampler.grid  # the steps are taken out of the grid
    grid = times_of(path, scheduler, sampler.steps, passes)
    if not _near(grid, sampler.times, allowed):
        raise UserError(
            f"student.times is {list(sampler.times)}, which no stock diffusers scheduler draws in {sampler.steps} "
            f"steps; the nearest is {[round(time, 4) for time in grid]}"
        )


def on_stock_grid(
    sampler: Sampler,
    path: NoisePath,
    teacher_scheduler: Any,
    steps: int | None = None,
    passes: frozenset[str] = frozenset(),
) -> Sampler:
    """The same sampler with the exact times that its scheduler has for ``steps`` (default: its own count)."""
    scheduler = stock_scheduler(sampler, path, teacher_scheduler, passes)
    return replace(sampler, times=times_of(path, scheduler, steps or sampler.steps, passes))


def times_of(
    path: NoisePath, scheduler: Any, steps: int, passes: frozenset[str] = frozenset()
) -> tuple[float, ...]:
    """The times at which a diffusers scheduler calls the network in ``steps`` steps of a pipeline that passes these."""
    if isinstance(path, TrigPath):
        scheduler.set_timesteps(steps, **of_count(steps))
        return tuple(min(1.0, float(value) / (math.pi / 2)) for value in scheduler.timesteps[:-1])
    given: dict[str, Any] = {}
    if "timesteps" in passes:  # as CogView4Pipeline has them
        given["timesteps"] = [float(int(1000 + i * (1 - 1000) / max(steps - 1, 1))) for i in range(steps)]
        given["sigmas"] = [time / 1000 for time in given["timesteps"]]
    elif "sigmas" in passes:
        given["sigmas"] = [1 - i / steps for i in range(steps)]
    scheduler.set_timesteps(steps, **given, **({"mu": 0.0} if "mu" in passes else {}))
    timesteps = [float(value) for value in scheduler.timesteps]
    if isinstance(path, TablePath):
        return tuple((value + 1) / path.steps for value in timesteps)
    times = tuple(value / 1000 for value in timesteps)
    if counts_up(scheduler):
        times = tuple(1 - time for time in times)
    # A clock that counts its time before the shift that is in the noise levels says little about them.
    levels = tuple(float(1 - value if counts_up(scheduler) else value) for value in scheduler.sigmas[:steps])
    return times if _near(times, levels, 1e-4) else levels
