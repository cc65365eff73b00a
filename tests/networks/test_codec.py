"""A pipeline without its denoiser: sizes that it draws, networks that leave the device and come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline, tiny_prompts

from stepdistill.errors import UserError
from stepdistill.export.student_folder import check_export
from stepdistill.families.size import DECODED_AT_ONCE, STATES_AT_ONCE, Size, at_once
from stepdistill.families.watching import frames_of
from stepdistill.networks.pictures import draw_as_pipeline, strip, teacher_pictures
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd", Size(30, 32), "sides that are multiples of 4 pixels"),
        ("sd3", Size(36, 32), "sides that are multiples of 8 pixels"),
        ("flux", Size(16, 20), "sides that are multiples of 8 pixels"),
        ("flux", Size(0, 8), "sides that are multiples of 8 pixels"),
        ("wan", Size(24, 16, 9), "sides that are multiples of 16 pixels"),
        ("wan", Size(16, 16, 8), r"8 frames, but this pipeline draws 4 n \+ 1 of them"),
        ("sd", Size(32, 32, 5), "draws pictures: leave them out"),
        ("dit", Size(16, 16), "DiTPipeline draws 32x32 alone"),
        ("unet-ddpm", Size(16, 16), "DDPMPipeline draws 8x8 alone"),
    ],
)
def test_sizes_that_a_pipeline_would_round_are_refused(name: str, size: Size, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PipelineTeacher(tiny_pipeline(name), size=size)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("sd", Size(16, 24), (4, 4, 6)),
        ("sdxl", Size(40, 32), (4, 10, 8)),
        ("sd3", Size(16, 24), (4, 4, 6)),
        ("flux", Size(8, 24), (4, 2, 6)),
        ("wan", Size(16, 32, 5), (4, 2, 2, 4)),
    ],
)
def test_the_pipeline_and_the_teacher_draw_at_another_size(
    name: str, size: Size, shape: tuple[int, ...]
) -> None:
    teacher = PipelineTeacher(tiny_pipeline(name), size=size)
    assert teacher.codec.shape == teacher.denoiser.shape == shape and teacher.codec.told_size == size
    prompts = tiny_prompts(name, 2)
    call = teacher.family.call_arguments(type(teacher.pipe).__name__, prompts, None, size)
    drawn = teacher.pipe(
        **call,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )[0]
    assert frames_of(drawn).shape == (2, size.frames, 3, size.height, size.width)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    said = teacher.predict(noise, torch.ones(2), teacher.codec.encode(prompts))
    frames = teacher.codec.to_frames(said.x0)
    assert frames.shape == (2, size.frames, 3, size.height, size.width) and frames.isfinite().all()


def test_a_size_that_the_pipeline_draws_by_itself_is_not_told(teacher_of: Teachers) -> None:
    codec = teacher_of("sd").codec
    assert codec.size == Size(32, 32) and codec.told_size is None
    assert replace(codec, size=Size(32, 16)).told_size == Size(32, 16)


def test_released_parts_come_back_for_as_long_as_they_are_needed() -> None:
    """On the meta device as the one that is left: what is not brought back could not compute."""
    codec = PipelineTeacher(tiny_pipeline("sd")).codec
    wanted = codec.encode(["a red heart"])["encoder_hidden_states"]
    states = torch.randn(1, *codec.shape, generator=torch.Generator().manual_seed(0))
    frames = codec.to_frames(states)
    assert not codec.encode(["a red heart"])["encoder_hidden_states"].requires_grad
    places: list[str] = []
    for name in ("text_encoder", "vae", "unet"):
        getattr(codec.pipe, name).to = lambda device, name=name: places.append(f"{name} {device}")
    codec.release("vae")
    assert places == ["vae cpu"]
    codec.release("text")
    assert places == ["vae cpu", "text_encoder cpu"]
    away = replace(codec, device=torch.device("meta"))  # everything counts as moved away from there
    moved: list[tuple[str, str]] = []
    for name in ("text_encoder", "vae", "unet"):
        getattr(codec.pipe, name).to = lambda device, name=name: moved.append((name, str(device)))
    assert torch.equal(away.encode(["a red heart"])["encoder_hidden_states"], wanted)
    assert torch.equal(away.to_frames(states), frames)
    # Where pictures alone are decoded, it stays away.
    assert moved.count(("text_encoder", "meta")) == moved.count(("text_encoder", "cpu")) == 1
    assert moved.count(("vae", "meta")) == moved.count(("vae", "cpu")) == 2


def test_a_strip_is_the_first_the_middle_and_the_last_frame() -> None:
    frames = torch.arange(5.0)[None, :, None, None, None].expand(2, 5, 3, 4, 6)
    assert strip(frames)[0, 0, 0].tolist() == [0.0] * 6 + [2.0] * 6 + [4.0] * 6
    assert torch.equal(strip(frames[:, 3:4]), frames[:, 3])


def test_large_pictures_are_drawn_in_parts(teacher_of: Teachers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SDXL's at 1024 x 1024 four states at once and one to decode; small ones all together. The pictures are the
    same, fresh noise between steps too."""
    large, small = (4, 128, 128), (4, 8, 8)
    assert [at_once(large, numbers, 64) for numbers in (STATES_AT_ONCE, DECODED_AT_ONCE)] == [4, 1]
    assert at_once(small, DECODED_AT_ONCE, 64) == 64 and at_once((16, 21, 60, 104), STATES_AT_ONCE, 64) == 1
    teacher = teacher_of("sd")
    student, sampler = Student.from_teacher(teacher), Sampler((1.0, 0.5), True)
    prompts, seeds, calls = ["a red heart", "a dog", "a tree"], [3, 1, 2], list[int]()
    decoded = type(teacher.codec).to_frames

    def to_frames(codec: Any, states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return decoded(codec, states)

    monkeypatch.setattr(type(teacher.codec), "to_frames", to_frames)

    def drawn() -> torch.Tensor:
        own = draw_as_pipeline(student, sampler, teacher.codec, prompts, seeds)
        return torch.cat([own, teacher_pictures(teacher, prompts, seeds, 2, 1.5)])

    together = drawn()
    monkeypatch.setattr("stepdistill.networks.pictures.DECODED_AT_ONCE", 2 * 4 * 8 * 8)
    torch.testing.assert_close(drawn(), together, atol=1e-5, rtol=0)
    assert calls == [3, 3, 2, 1, 2, 1]


def test_pictures_that_are_compared_are_drawn_in_full_float32(teacher_of: Teachers) -> None:
    """By the trainer and by the pipeline; TF32 would part them from those of another device. The setting comes back."""
    teacher, seen = teacher_of("sd"), set[str]()
    student, sampler = Student.from_teacher(teacher), Sampler((1.0,), True)
    convolution: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolution.fp32_precision
    student.net.register_forward_hook(lambda *_: seen.add(convolution.fp32_precision))
    convolution.fp32_precision = "tf32"
    try:
        draw_as_pipeline(student, sampler, teacher.codec, ["a red heart"], [0])
        check_export(student, sampler, teacher, "a red heart")
        assert seen == {"ieee"} and convolution.fp32_precision == "tf32"
    finally:
        convolution.fp32_precision = before
