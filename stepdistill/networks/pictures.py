"""The trainer's own pictures, from the very noises a pipeline draws for the same seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import solve
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.travelling import travelling_module


@torch.no_grad()
def draw_as_pipeline(
    student: Student, sampler: Sampler, teacher: PipelineTeacher, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """The trainer's pictures [B, 3, H, W] in [0, 1] from the very noises a pipeline draws, one generator a seed.

    Args:
        student: what is drawn with; LoRA is active.
        sampler: its steps.
        teacher: its encoder and decoder.
        prompts: B prompts.
        seeds: B seeds of CPU generators.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    shape = (1, *teacher.shape)

    def noise() -> Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.cat(rows).to(teacher.device)

    start, fresh = noise(), lambda call: noise()
    if isinstance(student.path, FlowPath):  # the noise of its travelling scheduler
        code = travelling_module("flow_consistency")
        keys = code.keys_of(start)
        fresh = lambda call: code.noise_after(keys, call, start)  # noqa: E731
    latents = sampler.draw(student, start, teacher.encode(list(prompts)), fresh)
    return teacher.to_images(latents)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded, on the CPU."""
    return (images * 255).round().to(torch.uint8).cpu()


@torch.no_grad()
def teacher_pictures(
    teacher: PipelineTeacher, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> Tensor:
    """The teacher's pictures [B, 3, H, W] in [0, 1] after ``steps`` DDIM steps on the grid of its schedule."""
    shape = (1, *teacher.shape)
    noise = torch.cat(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )
    cond = teacher.encode(list(prompts))
    times = (*schedule_times(teacher.path, steps), 0.0)
    latents = solve(
        lambda x, t: teacher.predict(x, t, cond, guidance=guidance), noise.to(teacher.device), times, "ddim"
    )
    return teacher.to_images(latents)
