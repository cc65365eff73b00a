"""What is compared before anything slow: a teacher's pictures with its pipeline's, a student's times with those asked.

A wrong scale or sign of time, a wrong layout of tokens or a condition that is not the pipeline's would train for hours
and look like a bad method.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.path import Path, TablePath, TrigPath
from stepdistill.errors import UserError, first_line
from stepdistill.families._findings import goes_back
from stepdistill.families.watching import Draw, frames_of, silent, watch
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.float32 import full_float32

ALLOWED = 4 / 255
"""How far the teacher's picture may be from its pipeline's."""


@torch.no_grad()
@full_float32()
def teacher_check(teacher: PipelineTeacher, prompt: str, steps: int) -> float | None:
    """How far the pipeline's own picture and the teacher's are apart, in [0, 1], on the pipeline's own scheduler.

    Both start from the noise of one seed and are not guided, on a scheduler that takes no learned variance, as no
    student has one. None where the pipeline hands that over all the same.

    Args:
        teacher: the teacher.
        prompt: what is drawn.
        steps: of its scheduler; each is two calls of the network.

    Raises:
        UserError: they are two pictures, or the pipeline does not draw by itself.
    """
    codec, family, kind = teacher.codec, teacher.family, type(teacher.pipe).__name__
    spelt = family.call_prompts(teacher.pipe, [prompt])
    takes = inspect.signature(type(teacher.pipe).__call__).parameters
    told = family.call_arguments(kind, spelt, teacher.denoiser.guidance, codec.told_size)
    call = {
        **{name: value for name, value in told.items() if name in takes},  # a student's may take more
        **family.own_arguments(teacher.pipe),
        "num_inference_steps": steps,
        **family.grid_arguments(steps),
        "generator": [torch.Generator("cpu").manual_seed(0)],
        "output_type": "np",
    }
    scheduler = teacher.pipe.scheduler
    if scheduler.config.get("variance_type") in ("learned", "learned_range"):
        scheduler = type(scheduler).from_config(scheduler.config, variance_type="fixed_small")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # for schedulers that take noise of no generator
        try:
            seen = watch(teacher.pipe, call, scheduler=scheduler)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"a {kind} of these parts does not draw when it is called with a prompt and its own defaults "
                f"({first_line(error)}): give one that does"
            ) from error
        if any(step.output.shape != step.sample.shape for step in seen.steps):
            return None
        torch.default_generator.manual_seed(0)
        ours, theirs = _drawn_again(teacher, prompt, seen), frames_of(seen.drawn)
    apart = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not apart <= ALLOWED:
        raise UserError(
            f"teacher check: {kind} and the family {family.name} draw two pictures from one seed in {steps} steps, "
            f"{apart:.2g} apart: the family's time, sign, layout or conditions are not the pipeline's"
        )
    return apart


def _drawn_again(teacher: PipelineTeacher, prompt: str, seen: Draw) -> Tensor:
    """The picture [1, F, 3, H, W] of a draw, through the teacher and the same scheduler's steps."""
    codec, family, scheduler = teacher.codec, teacher.family, seen.scheduler
    noise = torch.randn((1, *codec.shape), generator=torch.Generator("cpu").manual_seed(0)).to(teacher.device)
    x, cond = family.pack(noise) * getattr(scheduler, "init_noise_sigma", 1.0), codec.encode([prompt])
    scaled = getattr(scheduler, "scale_model_input", lambda state, timestep: state)
    sign = -1 if goes_back(seen.steps) else 1
    for i, t in enumerate(times_asked(seen, teacher.path)):
        timestep = scheduler.timesteps[i]
        state = family.unpack(scaled(x, timestep), codec.shape)
        said = teacher.denoiser.raw(state, torch.full((1,), t, device=x.device), cond)
        output = sign * family.pack(said)
        x = scheduler.step(output, timestep, x, **seen.steps[i].given, return_dict=False)[0]
    return codec.to_frames(family.unpack(x, codec.shape)).cpu()


def grid_check(seen: Draw, sampler: Sampler, path: Path) -> None:
    """The draw of a student's pipeline asked its network for exactly the student's times.

    Raises:
        UserError: it asked for others.
    """
    asked = times_asked(seen, path)
    if (
        len(asked) != sampler.steps
        or max(abs(a - b) for a, b in zip(asked, sampler.times, strict=True)) > 1e-4
    ):
        raise UserError(
            f"grid check: a {type(seen.scheduler).__name__} in the student's pipeline asks the network for the times "
            f"{[round(t, 4) for t in asked]}, not for student.times {[round(t, 4) for t in sampler.times]}: set those, "
            "or student.times=[1.0]"
        )


def silent_draw(pipe: Any, network: str, call: Mapping[str, Any]) -> Draw:
    """A draw of one picture whose network, but for its first call, says nothing: what it is asked costs no more.

    Args:
        pipe: the pipeline.
        network: the name of its network.
        call: its arguments.

    Raises:
        UserError: it does not draw with its scheduler in so many steps.
    """
    common = {**call, "generator": [torch.Generator("cpu").manual_seed(0)], "output_type": "np"}
    try:
        first = watch(pipe, common, end_after=1).steps[0].calls[-1].output
    except UserError:
        raise
    except Exception as error:
        steps = call.get("num_inference_steps", 1)
        raise UserError(
            f"{type(pipe).__name__} does not draw with a {type(pipe.scheduler).__name__} of {steps} step"
            f"{'s' * (steps != 1)} ({first_line(error)})"
        ) from error
    return watch(pipe, common, instead={network: lambda *args, **kwargs: silent(first, 1)})


def times_asked(seen: Draw, path: Path) -> list[float]:
    """The t in [0, 1] at which the steps of a draw were taken."""
    if isinstance(path, TablePath):
        return [(step.timestep + 1) / path.steps for step in seen.steps]
    if isinstance(path, TrigPath):
        return [step.timestep / (math.pi / 2) for step in seen.steps]
    # CogView4's scheduler counts its time without the shift that is in its noise levels.
    apart = any(s.sigma is not None and abs(s.sigma - s.timestep / 1000) > 2e-3 for s in seen.steps)
    return [step.sigma if apart and step.sigma is not None else step.timestep / 1000 for step in seen.steps]
