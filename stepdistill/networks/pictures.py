"""The trainer's own pictures, from the very noises a pipeline draws for the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import solve
from stepdistill.families.size import DECODED_AT_ONCE, at_once
from stepdistill.networks.codec import Codec
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.float32 import full_float32
from stepdistill.system.travelling import travelling_module


def draw_as_pipeline(
    student: Student, sampler: Sampler, codec: Codec, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """The trainer's pictures, as :func:`strip` lays them out, from the very noises a pipeline draws, one generator a
    seed.

    Args:
        student: what is drawn with; LoRA is active.
        sampler: its steps.
        codec: encodes the prompts and decodes the states.
        prompts: B prompts.
        seeds: B seeds of CPU generators.
    """
    return torch.cat(
        [strip(frames) for frames in frames_as_pipeline(student, sampler, codec, prompts, seeds)]
    )


def frames_as_pipeline(
    student: Student, sampler: Sampler, codec: Codec, prompts: Sequence[str], seeds: Sequence[int]
) -> Iterator[Tensor]:
    """The same with all frames [B', F, 3, H, W] in [0, 1], as many at a time as are decoded together."""
    for part in _parts(codec, prompts, seeds):
        yield _drawn(student, sampler, codec, *part)


@torch.no_grad()
@full_float32()
def _drawn(
    student: Student, sampler: Sampler, codec: Codec, prompts: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    family, shape = codec.family, (1, *codec.shape)
    start = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(codec.device)
    packed = family.pack(start[:1]).shape  # in which its scheduler draws noise

    def drawn(call: int) -> Tensor:
        noise = torch.cat([torch.randn(packed, generator=own) for own in generators]).to(codec.device)
        # Where the layouts are one, SANA-Sprint's packing is a scale, which fresh noise has not.
        return noise if packed == shape else family.unpack(noise, codec.shape)

    fresh: Callable[[int], Tensor] = drawn
    if isinstance(student.path, FlowPath):  # the noise of its travelling scheduler
        fresh = codec.fresh_noise(travelling_module("flow_consistency"), start)
    states = sampler.draw(student, start, codec.encode(prompts), fresh)
    return codec.to_frames(states)


def _parts(
    codec: Codec, prompts: Sequence[str], seeds: Sequence[int]
) -> list[tuple[Sequence[str], Sequence[int]]]:
    """What is drawn one after the other, as all together might not be decoded on a common card."""
    most = at_once(codec.shape, DECODED_AT_ONCE, len(prompts))
    return [(prompts[i : i + most], seeds[i : i + most]) for i in range(0, len(prompts), most)]


def strip(frames: Tensor) -> Tensor:
    """Frames [B, F, 3, H, W] as pictures [B, 3, H, W']: of a video the first, the middle and the last side by side, of
    a picture itself."""
    return torch.cat([frames[:, i] for i in shown_frames(frames.shape[1])], dim=3)


def shown_frames(count: int) -> list[int]:
    """Which of so many frames :func:`strip` shows."""
    return list(dict.fromkeys((0, count // 2, count - 1)))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] to uint8, rounded, on the CPU."""
    return (images * 255).round().to(torch.uint8).cpu()


def teacher_pictures(
    teacher: PipelineTeacher, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> Tensor:
    """The teacher's pictures, as :func:`strip` lays them out, after ``steps`` DDIM steps on its schedule's grid."""
    return torch.cat([strip(frames) for frames in teacher_frames(teacher, prompts, seeds, steps, guidance)])


def teacher_frames(
    teacher: PipelineTeacher,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    codec: Codec | None = None,
) -> Iterator[Tensor]:
    """The same with all frames [B', F, 3, H, W] in [0, 1], as many at a time as are decoded together; by another codec
    than the teacher's, which has encoded the prompts."""
    codec = codec or teacher.codec
    for part in _parts(codec, prompts, seeds):
        yield _taught(teacher, codec, *part, steps, guidance)


@torch.no_grad()
def _taught(
    teacher: PipelineTeacher,
    codec: Codec,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
) -> Tensor:
    shape = (1, *codec.shape)
    noise = torch.cat(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )
    cond = codec.encode(prompts)
    times = (*schedule_times(teacher.path, steps), 0.0)
    states = solve(
        lambda x, t: teacher.predict(x, t, cond, guidance=guidance), noise.to(teacher.device), times, "ddim"
    )
    return codec.to_frames(states)
