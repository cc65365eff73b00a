"""How a student is sampled in the trainer, and the diffusers scheduler that does the same after export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath, Path, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.system.travelling import travelling_module

if TYPE_CHECKING:
    from stepdistill.networks.denoiser import Denoiser


@dataclass(frozen=True)
class Sampler:
    """A few-step sampler: at each time predict x0, then go to the next time, and end with x0.

    Where the first time t is below 1, the network is still handed standard normal noise, as though that were a state at
    t: it is a generator that is called at t (DMD2's SDXL at timestep 399, SiD-LSG at 625), and no point of a trajectory
    is alpha x0 + sigma eps there. So only a method that matches the distribution of what is drawn can train it
    (``Method.starts_below``); an x0 error that an eps or v output makes is smaller there than at t = 1.

    Attributes:
        times: where the network is called, descending; the first, 1 or less, with pure noise.
        renoise: go on with fresh noise, alpha x0 + sigma eps (consistency sampling); otherwise with the predicted
            noise (DDIM, Euler).
        grid: for a student trained on a grid of this many times, any of whose step counts may be drawn; None for a
            student trained at ``times`` alone.
        guidance: the scale that a student with a guidance embedding is given; None for any other student, whose
            guidance is in its weights.
        two_times: whether the network is told where each of its jumps ends.
        gamma: for a student that jumps from any time of a table to any other, the share in [0, 1] by which a jump goes
            past its end, from where fresh noise leads back (TCD, Zheng et al. 2024, 2402.19159); its last jump
            ends at timestep 0. A pipeline must be told of it, as its ``eta``. None for any other student.
        prediction_type: diffusers' name for the output of a student on a table, where it is not the teacher's kind.
    """

    times: tuple[float, ...]
    renoise: bool
    grid: int | None = None
    guidance: float | None = None
    two_times: bool = False
    gamma: float | None = None
    prediction_type: str | None = None

    @property
    def gap(self) -> float:
        """t - s of every jump, which a stock class holds as a constant.

        Raises:
            UserError: where the jumps differ in length.
        """
        gap = 1 / self.steps
        if max(abs(t - (1 - i * gap)) for i, t in enumerate(self.times)) > 1.5e-3:
            raise UserError(
                f"student.times is {list(self.times)}, jumps of unequal length, which no stock diffusers class can be "
                f"told of: use {[round(time, 4) for time in uniform_times(self.steps)]}"
            )
        return gap

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Step counts worth evaluating."""
        return (1, 2, 4, 8) if self.grid else (self.steps,)

    def call_arguments(self) -> dict[str, float]:
        """What a pipeline's call needs besides its steps: TCD's gamma, which diffusers calls eta."""
        return {"eta": self.gamma} if self.gamma else {}

    def walk(
        self, denoiser: Denoiser, noise: Tensor, cond: Condition, fresh: Callable[[int], Tensor], calls: int
    ) -> Tensor:
        """The state [B, C, H, W] at ``times[calls]``, after the first ``calls`` network calls."""
        x = noise
        for i in range(calls):
            t, s = (torch.full((len(x),), time, device=x.device) for time in self.times[i : i + 2])
            prediction = denoiser.predict(x, t, cond, s) if self.two_times else denoiser.predict(x, t, cond)
            if self.gamma is not None:
                past = _past(denoiser.path, s, self.gamma)
                x = denoiser.path.renoise(prediction.at(past), past, s, fresh(i))
            else:
                x = denoiser.path.sample(prediction.x0, fresh(i), s) if self.renoise else prediction.at(s)
        return x

    def draw(
        self, denoiser: Denoiser, noise: Tensor, cond: Condition, fresh: Callable[[int], Tensor]
    ) -> Tensor:
        """Clean latents [B, C, H, W].

        Args:
            denoiser: the student, or anything with its ``predict`` and ``path``.
            noise: standard normal start [B, C, H, W].
            cond: conditions of the B samples.
            fresh: fresh(i) gives the standard normal noise [B, C, H, W] that follows call i, from 0.
        """
        if self.guidance is not None:
            scales = torch.full((len(noise),), self.guidance, device=noise.device)
            embedding = denoiser.family.embed_guidance(denoiser.net, scales)
            cond = cond.with_tensor("guidance_embedding", embedding)
        x = self.walk(denoiser, noise, cond, fresh, self.steps - 1)
        t = torch.full((len(x),), self.times[-1], device=x.device)
        more = (torch.zeros_like(t),) if self.two_times else ()
        last = denoiser.predict(x, t, cond, *more)
        return last.x0 if self.gamma is None else last.at(_past(denoiser.path, torch.zeros_like(t), 0.0))

    def scheduler(self, path: Path, teacher_scheduler: Any) -> Any:
        """The scheduler that draws as this sampler does, its grid pinned by its config alone: a stock one, but for
        fresh noise on a flow path, where ``pipelines/flow_consistency.py`` travels along.

        Raises:
            UserError: when no scheduler has this grid.
        """
        from diffusers import DDIMScheduler, FlowMapEulerDiscreteScheduler, LCMScheduler, TCDScheduler

        scheduler: Any
        if isinstance(path, FlowPath):
            if self.times[0] < 1 - 1.5e-3:
                raise UserError(
                    f"student.times starts at {self.times[0]:g}, but diffusers' flow schedulers call a network first "
                    "at pure noise: set 1.0"
                )
            kind: Any = FlowMapEulerDiscreteScheduler
            if self.renoise and self.step_counts != (1,):
                # The stock ones that take fresh noise (FlowMatchLCM, FlowMatchEuler with stochastic_sampling) draw it
                # from the global generator in SD3's pipeline, and their grid ends at 1/1000.
                kind = travelling_module("flow_consistency").FlowConsistencyScheduler
            scheduler = kind(shift=self._shift(path))
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
            last = path.steps if self.grid else round(self.times[0] * path.steps)
            if (
                last < path.steps
            ):  # schedulers call a network first at the end of their table, so it ends there
                betas = teacher_scheduler.betas[:last].tolist()
                config |= {"num_train_timesteps": last, "trained_betas": betas}
                config["rescale_betas_zero_snr"] = False
            config["prediction_type"] = self.prediction_type or config["prediction_type"]
            config["clip_sample"] = False
            # Read by neither scheduler on these grids; Stable Diffusion pipelines rewrite any other value, and warn.
            config["steps_offset"] = 1
            if self.gamma is not None:
                scheduler = TCDScheduler(**config, original_inference_steps=self.grid or path.steps)
            elif self.renoise or self.steps == 1:
                uniform = self.steps if last % self.steps == 0 else last
                # With as many original steps as the student has, a call that forgets num_inference_steps (and so asks
                # for 50) raises instead of drawing on a grid the student never saw.
                scheduler = LCMScheduler(**config, original_inference_steps=self.grid or uniform)
            else:
                scheduler = DDIMScheduler(**config, timestep_spacing="trailing", set_alpha_to_one=True)
        else:
            raise UserError(f"students on a {type(path).__name__} have no stock diffusers scheduler")
        self._check_grid(path, scheduler)
        return scheduler

    def _shift(self, path: FlowPath) -> float:
        """The s of the time shift that maps the uniform grid to these times; that of the path for one step."""
        if self.steps == 1:
            return path.shift
        t, u = self.times[-1], 1 / self.steps
        return round(t * (1 - u) / (u * (1 - t)), 6)

    def _check_grid(self, path: Path, scheduler: Any) -> None:
        allowed = 1.5e-3
        if self.grid and isinstance(path, TablePath):
            if path.steps % self.grid:
                wanted = self.grid
                every = [n for n in range(1, path.steps + 1) if path.steps % n == 0]
                near = [n for n in every if n < wanted][-1:] + [n for n in every if n > wanted][:1]
                raise UserError(
                    f"a grid of {wanted} times does not divide the teacher's {path.steps} timesteps, so drawings would "
                    f"not start at the last of them: set options.grid to a divisor, {' or '.join(map(str, near))}"
                )
            allowed += 1 / self.grid  # the steps are taken out of the grid
        grid = times_of(path, scheduler, self.steps)
        if max(abs(a - b) for a, b in zip(grid, self.times, strict=True)) > allowed:
            raise UserError(
                f"student.times is {list(self.times)}, which no stock diffusers scheduler draws in {self.steps} "
                f"steps; the nearest is {[round(time, 4) for time in grid]}"
            )

    def on_grid_of(self, path: Path, teacher_scheduler: Any, steps: int | None = None) -> Sampler:
        """The same sampler with the exact times that its scheduler has for ``steps`` (default: its own count)."""
        scheduler = self.scheduler(path, teacher_scheduler)
        return replace(self, times=times_of(path, scheduler, steps or self.steps))


def _past(path: Path, s: Tensor, gamma: float) -> Tensor:
    """The time [B] of timestep floor((1 - gamma) n) of a table, n >= 0 being the timestep of s [B]."""
    assert isinstance(path, TablePath)
    n = ((s * path.steps).round() - 1).clamp_min(0)
    return (torch.floor((1 - gamma) * n) + 1) / path.steps


def schedule_times(path: Path, steps: int) -> tuple[float, ...]:
    """The times of K steps of a teacher on its path: the uniform ones, on a flow path with its time shift."""
    return tuple(path.shifted(time) for time in uniform_times(steps))


def times_of(path: Path, scheduler: Any, steps: int) -> tuple[float, ...]:
    """The times at which a diffusers scheduler calls the network in ``steps`` steps."""
    scheduler.set_timesteps(steps)
    timesteps = [float(value) for value in scheduler.timesteps]
    if isinstance(path, TablePath):
        return tuple((value + 1) / path.steps for value in timesteps)
    return tuple(value / 1000 for value in timesteps)
