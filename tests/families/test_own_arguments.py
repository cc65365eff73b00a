"""What the call of one pipeline must be told, and others of its class need not."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline
from tiny_more import cog_video_x_of_short_prompts

from stepdistill.cli.doctor import _grid_of
from stepdistill.export.checks import teacher_check
from stepdistill.export.student_folder import check_export, pipeline_call
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher


def test_a_cogvideox_is_told_how_long_its_prompts_are() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = PipelineTeacher(cog_video_x_of_short_prompts(), "cpu")
    assert teacher.codec.encode(["a cat"])["encoder_hidden_states"].shape[1] == 16
    assert teacher_check(teacher, "a cat", 1) < 1e-5  # type: ignore[operator]  # it is compared
    sampler = Sampler((1.0,), renoise=True)
    assert pipeline_call("CogVideoXPipeline", sampler, teacher.codec, ["a cat"])["max_sequence_length"] == 16
    check_export(Student.from_teacher(teacher), sampler, teacher, "a cat")  # draws with that call
    usual = PipelineTeacher(tiny_pipeline("cog-video-x"), "cpu")
    assert "max_sequence_length" not in pipeline_call("CogVideoXPipeline", sampler, usual.codec, ["a cat"])


def test_doctor_shows_the_second_of_two_steps_that_a_sana_sprint_draws() -> None:
    teacher = PipelineTeacher(tiny_pipeline("sana-sprint"), "cpu")
    times = {n: _grid_of(teacher.denoiser, teacher.pipe.scheduler, n).times for n in (2, 4)}
    assert times == {
        2: pytest.approx((1.0, 0.8276), abs=1e-4),
        4: pytest.approx((1.0, 0.75, 0.5, 0.25), abs=1e-4),
    }
