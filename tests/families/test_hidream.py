"""HiDream-I1: its experts learn, and it is called as its pipeline calls it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_hidream import tiny_hidream

from stepdistill.diffusion.solvers import solve
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.families._recording import record
from stepdistill.families.size import Size
from stepdistill.families.watching import frames_of
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

PROMPTS = ["a red heart", "blue fish"]


@pytest.fixture(scope="module")
def teacher() -> PipelineTeacher:
    return PipelineTeacher(tiny_hidream())


def test_it_draws_what_its_pipeline_draws_and_is_called_as_recorded(teacher: PipelineTeacher) -> None:
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "output_type": "np", "return_dict": False}
    drawn = teacher.pipe(**call, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))[0]
    times = teacher.pipe.scheduler.sigmas.tolist()
    noise = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    cond = teacher.codec.encode(PROMPTS)
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=4.0), noise, times, "euler")
    assert (teacher.codec.to_frames(states) - frames_of(drawn)).abs().max() < 1e-4
    assert states.std() > 0.5 and (states[0] - states[1]).abs().max() > 0.1

    net = teacher.denoiser
    recorded = record(teacher.pipe, net.path, net.output, teacher.size)
    assert recorded.shift(teacher.pipe, 0) == pytest.approx(teacher.path.shift)  # type: ignore[attr-defined]
    other = Denoiser(net.net, net.path, net.output, recorded, teacher.codec.shape)
    t = torch.tensor([0.9, 0.3])
    ours, theirs = (
        net.raw(noise, t, cond),
        other.raw(noise, t, recorded.encode(teacher.pipe, PROMPTS, teacher.size)),
    )
    assert (ours - theirs).abs().max() < 2e-5 * ours.abs().max()


def test_experts_have_gradients_and_say_what_they_say_without(teacher: PipelineTeacher) -> None:
    student, cond = Student.from_teacher(teacher), teacher.codec.encode(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *teacher.codec.shape, generator=generator), torch.tensor([0.9, 0.3])
    student.net.eval()
    plain = student.net(
        x,
        1000 * t,
        cond["encoder_hidden_states_t5"],
        cond["encoder_hidden_states_llama3"].transpose(0, 1),
        cond["pooled_embeds"],
        return_dict=False,
    )[0]
    said = student.raw(x, t, cond)
    assert (said + plain).abs().max() < 1e-5 * plain.abs().max()
    said.square().mean().backward()
    still = [
        name for name, value in student.net.named_parameters() if value.grad is None or not value.grad.any()
    ]
    assert not still and not student.net.training


def test_all_pictures_are_of_one_area(teacher: PipelineTeacher) -> None:
    """Others are refused; of those that are not square, features leave out what pads them."""
    with pytest.raises(
        UserError, match=r"draws all pictures of one area, and 128x128 for it: set \[128, 128\]"
    ):
        PipelineTeacher(teacher.pipe, size=Size(64, 64))
    pipe = copy.copy(teacher.pipe)
    pipe.default_sample_size = 64
    wide = PipelineTeacher(pipe, size=Size(32, 128))
    assert wide.codec.shape == (4, 32, 128) and pipe.transformer.max_seq == 64
    x = torch.randn(1, *wide.codec.shape, generator=torch.Generator().manual_seed(0))
    features = wide.denoiser.features(x, torch.tensor([0.5]), wide.codec.encode(PROMPTS[:1]))
    width, height, breadth = wide.family.feature_shape(wide.denoiser.net, wide.codec.shape)
    assert features.shape == (1, height * breadth, width) and (height, breadth) == (2, 8)


def test_adapters_are_exported_and_proven(teacher: PipelineTeacher, tmp_path: Path) -> None:
    roles = Adapters(PipelineTeacher(tiny_hidream()), 2, 6.0)
    for key, value in roles.student.net.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(1))
    mine = roles.teacher
    sampler = on_stock_grid(
        Sampler((1.0, 0.6), False), mine.path, mine.pipe.scheduler, passes=mine.family.passes
    )
    export(roles.student, sampler, mine, tmp_path / "student", PROMPTS, "", seeds=(0, 1))
    assert verify(tmp_path / "student").worst <= 1
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
