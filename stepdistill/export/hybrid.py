"""Hybrid inference: the first steps by the guided teacher, the others by the student, as one pipeline.

A distilled student settles on a layout at its first call, where the teacher's guided steps keep several open: with them
first, a few-step student is as varied as its teacher (Gandikota and Bau, "Distilling Diversity and Control in Diffusion
Models", 2025, arXiv 2503.10637). Nothing is trained. The teacher takes DDIM (Euler) steps, which keep the noise that it
predicts, down to the time of the student's call that is to be its first; there, at that very time, the student goes on
as it would by itself, with fresh noise between its steps where it takes some.

The network of the pipeline is ``pipelines/phased_experts.py``: its first expert holds the condition that guidance
starts from, so that the pipeline is called without guidance, as a student's is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.remembered import at_time
from stepdistill.errors import UserError
from stepdistill.export.card import model_card
from stepdistill.export.checks import silent_draw, times_asked
from stepdistill.export.composed import write_composed
from stepdistill.export.guided_experts import guided_experts, null_rows
from stepdistill.export.shared import terms_of
from stepdistill.export.verify import read_manifest, student_folder
from stepdistill.families.watching import Draw
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.loading import load_pipeline, with_merged_adapters
from stepdistill.networks.own_call import OwnCall, own_call, refuse_pictures
from stepdistill.networks.pictures import strip
from stepdistill.networks.sampler import schedule_times
from stepdistill.networks.scheduler_path import OUTPUTS, PREDICTION_TYPES, path_of
from stepdistill.networks.switched import SwitchedNetworks
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.float32 import full_float32
from stepdistill.system.travelling import travelling_module

RENOISE = {
    "LCMScheduler": True,
    "DDIMScheduler": False,
    "FlowMapEulerDiscreteScheduler": False,
    "FlowMatchEulerDiscreteScheduler": False,
}
"""Schedulers of students, and whether they take fresh noise between steps; FlowConsistencyScheduler says it itself."""


@dataclass(frozen=True)
class Hybrid:
    """A teacher and a student as one pipeline.

    Attributes:
        teacher: takes the first steps.
        guidance: its scale.
        student: its network, as plain diffusers loads it.
        times: of all calls, descending.
        teacher_calls: how many of them are the teacher's.
        renoise: whether the student takes fresh noise between its steps.
        pipe: the pipeline.
    """

    teacher: PipelineTeacher
    guidance: float
    student: nn.Module
    times: tuple[float, ...]
    teacher_calls: int
    renoise: bool
    pipe: Any

    @torch.no_grad()
    @full_float32()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] from the noises that a pipeline draws for these seeds, by teacher and student
        themselves, one generator a seed."""
        teacher, codec = self.teacher, self.teacher.codec
        noise = [torch.randn((1, *codec.shape), generator=torch.Generator().manual_seed(s)) for s in seeds]
        x, cond = torch.cat(noise).to(codec.device), codec.encode(prompts)
        own = teacher.denoiser
        student = Denoiser(self.student, own.path, own.output, own.family, own.shape)
        fresh = codec.fresh_noise(travelling_module("given_steps"), x)
        for call, (time, after) in enumerate(zip(self.times, (*self.times[1:], 0.0), strict=True)):
            t, s = at_time(time, x), at_time(after, x)
            if call < self.teacher_calls:
                said = teacher.predict(x, t, cond, guidance=self.guidance)
            else:
                said = student.predict(x, t, cond)
            if after and self.renoise and call >= self.teacher_calls:
                x = own.path.noised(said.x0, fresh(call), s)
            else:
                x = said.at(s) if after else said.x0
        return strip(codec.to_frames(x))


def hybrid(
    teacher: PipelineTeacher,
    student: Any,
    own: OwnCall,
    seen: Draw,
    guidance: float,
    calls: int,
    grid: int | None,
    prompt: str,
) -> Hybrid:
    """Puts a teacher and a student together.

    Args:
        teacher: whose first steps there are to be.
        student: the student's pipeline.
        own: its call.
        seen: a draw of it.
        guidance: the teacher's scale.
        calls: how many of the student's calls the teacher takes; from the next one on it is the student's.
        grid: so many steps has the teacher's own grid, of which it takes those above that next call; None: it takes its
            steps at the student's times.
        prompt: any that is not empty, or a class.

    Raises:
        UserError: the two do not fit, or this cannot be one pipeline.
    """
    family, path, name = teacher.family, teacher.path, type(student.scheduler).__name__
    renoise = RENOISE.get(name, student.scheduler.config.get("renoise", None))
    _check(teacher, student, own, guidance, renoise)
    times = times_asked(seen, path)
    steps = [step.timestep for step in seen.steps]
    if not 0 <= calls <= len(times):
        raise UserError(
            f"--teacher-calls is {calls}, and this student draws in {len(times)}: give 0 to {len(times)}"
        )
    if abs(times[0] - 1) > 2e-3:
        raise UserError(
            f"this student is called first at t = {times[0]:.4g} with pure noise, which is no state of its teacher's "
            "there: take one whose student.times start at 1.0"
        )
    nets: list[Any] = [getattr(student, family.network)]
    if not calls:
        return Hybrid(teacher, guidance, nets[0], tuple(times), 0, bool(renoise), copy.copy(student))
    asked = [_network_time(step.calls[-1].kwargs, step.calls[-1].args) for step in seen.steps]
    if grid:
        times, steps, count = _finer(teacher, times, steps, calls, grid)
    else:
        count = calls
    # Between the teacher's last call and the student's first, so that no rounding moves one to the other.
    last = family.time(path, torch.tensor([times[count - 1]])).item()
    bounds = [(last + asked[calls]) / 2] if calls < len(asked) else []
    experts, inner = _experts(nets[0], bounds[0] if bounds else None)
    pipe = copy.copy(student)
    null = [] if guidance == 1.0 else null_rows(teacher, prompt)
    net = guided_experts(teacher, guidance, experts, [*bounds, *inner], null)
    alphas, sigmas = (each.tolist() for each in path.alpha_sigma(torch.tensor(times)))
    scheduler = travelling_module("given_steps").GivenStepsScheduler(
        steps=steps,
        alphas=alphas,
        sigmas=sigmas,
        plain=count,
        renoise=bool(renoise),
        prediction_type="flow_prediction"
        if isinstance(path, FlowPath)
        else PREDICTION_TYPES[teacher.denoiser.output],
    )
    pipe.register_modules(**{family.network: net, "scheduler": scheduler})
    return Hybrid(teacher, guidance, nets[0], tuple(times), count, bool(renoise), pipe)


def write_hybrid(
    teacher: PipelineTeacher,
    name: str,
    student: str | Path,
    folder: Path,
    *,
    guidance: float,
    calls: int,
    grid: int | None = None,
    command: str = "",
) -> Hybrid:
    """Writes the folder of a hybrid pipeline.

    Args:
        teacher, guidance, calls, grid: see :func:`hybrid`.
        name: the teacher's.
        student: a student's folder, or its run's.
        folder: where to.
        command: for the card.

    Raises:
        UserError: the two do not fit, or this cannot be one pipeline.
    """
    source = student_folder(student)
    own, manifest = own_call(source), read_manifest(source)
    assert own is not None
    pipe = with_merged_adapters(load_pipeline(source, teacher.device)[0])
    family, call = teacher.family, dict(manifest["call"])
    refuse_pictures(call, "hybrid")
    if not hasattr(pipe, family.network):
        raise UserError(
            f"{student} is a {type(pipe).__name__}, and {name} a {type(teacher.pipe).__name__}: give the student's own "
            "teacher"
        )
    listed = ("prompt", "class_labels")
    one = {key: value[:1] if key in listed else value for key, value in call.items()}
    one |= {"batch_size": 1} if "batch_size" in one else {}
    prompts = [str(each) for each in call.get("prompt") or call.get("class_labels") or manifest["seeds"]]
    seen = silent_draw(pipe, family.network, one)
    made = hybrid(teacher, pipe, own, seen, guidance, calls, grid, prompts[0])
    call["num_inference_steps"] = len(made.times)
    times = ", ".join(f"{time:.4g}" for time in made.times)
    rest = len(made.times) - made.teacher_calls
    card = model_card(
        teacher=name,
        method="hybrid",
        summary=f"The first {made.teacher_calls} of its calls are the guided teacher's, which are two network passes "
        f"each, and the other {rest} a student's (arXiv 2503.10637). Nothing was trained.",
        steps=len(made.times),
        guidance=guidance,
        call=call,
        grid=f"`{type(made.pipe.scheduler).__name__}`: t = {times}",
        command=command,
        terms=terms_of(str(source)),
        pictures=len(manifest["seeds"]),
        video=family.video,
    )
    write_composed(
        folder, made.pipe, family.network, source, call, manifest["seeds"],
        lambda: made.draw(prompts, manifest["seeds"]), card, alone=family.alone,
    )  # fmt: skip
    return made


def _check(teacher: PipelineTeacher, student: Any, own: OwnCall, guidance: float, renoise: Any) -> None:
    """What cannot be one pipeline is told before anything slow."""
    family, name = teacher.family, type(student.scheduler).__name__
    if renoise is None:
        known = ", ".join([*RENOISE, "FlowConsistencyScheduler"])
        raise UserError(
            f"this student draws with {name}, whose steps cannot go on from a teacher's here: take one with {known}"
        )
    if own.input_guidance is not None or teacher.denoiser.guidance is not None:
        whose = "student" if own.input_guidance is not None else "teacher"
        raise UserError(
            f"this {whose} takes the guidance scale as an input, which one call cannot say to both: take another"
        )
    if isinstance(teacher.denoiser.net, SwitchedNetworks) or family.keeps_length:
        raise UserError(
            f"{family.name} guides in a way, or between networks, that a hybrid pipeline has not: take another teacher"
        )
    if guidance != 1.0 and teacher.null is None:
        raise UserError(
            f"--guidance is {guidance:g}, but this teacher has no unconditional mode: give --guidance 1"
        )
    path = path_of(student.scheduler)[0]
    table = isinstance(teacher.path, TablePath)
    if table != isinstance(path, TablePath) or (
        isinstance(path, TablePath)
        and isinstance(teacher.path, TablePath)
        and not torch.allclose(path.angles[-1], teacher.path.angles[-1], atol=1e-5)
    ):
        raise UserError("this student lies on another noise schedule than this teacher: give its own teacher")
    kind = student.scheduler.config.get("prediction_type")
    if table and OUTPUTS.get(str(kind)) != teacher.denoiser.output:
        raise UserError(
            f"this student's network says {kind}, and its teacher's {PREDICTION_TYPES[teacher.denoiser.output]}: one "
            "scheduler cannot read both; train it with student.output=teacher"
        )


def _finer(
    teacher: PipelineTeacher, times: Sequence[float], steps: Sequence[float], calls: int, grid: int
) -> tuple[list[float], list[float], int]:
    """Times and timesteps with the teacher's own grid above the student's first call, and how many of them that is."""
    path, end = teacher.path, times[calls] if calls < len(times) else 0.0
    own = [time for time in schedule_times(path, grid) if time > end + 1e-3]
    if isinstance(path, TablePath):
        numbers: list[float] = [float(max(0, round(time * path.steps) - 1)) for time in own]
        own = [(number + 1) / path.steps for number in numbers]
    elif any(abs(step - 1000 * time) > 1 for step, time in zip(steps, times, strict=True)):
        raise UserError(
            "--teacher-grid: this pipeline tells its network another time than the noise's: leave it out"
        )
    else:
        numbers = [1000 * time for time in own]
    return [*own, *times[calls:]], [*numbers, *steps[calls:]], len(own)


def _network_time(kwargs: dict[str, Any], args: tuple[Any, ...]) -> float:
    """The time that a network was told."""
    told = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    return float(torch.as_tensor(told).flatten()[0])


def _experts(net: Any, bound: float | None) -> tuple[list[Any], list[float]]:
    """The student's networks that are called at or below a time of the network's, and the bounds between them."""
    if bound is None:
        return [], []
    if type(net).__name__ != "PhasedExperts":
        return [net], []
    kept = [i for i, end in enumerate([*net.bounds, float("-inf")]) if end < bound]
    return [net.experts[i] for i in kept], [net.bounds[i] for i in kept[:-1]]
