"""Guidance asked of a teacher that has it in its weights is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler, TCDScheduler
from tiny import tiny_pipeline

from stepdistill.networks.distilled import guidance_warning, why_guided_already, why_of_few_steps
from stepdistill.networks.teacher import PipelineTeacher


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


def teacher_with(pipe: Any, kind: Any, **config: Any) -> PipelineTeacher:
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
    return PipelineTeacher(pipe, "cpu")


@pytest.mark.parametrize(
    ("kind", "config", "told"),
    [
        (LCMScheduler, {}, "LCMScheduler"),
        (TCDScheduler, {}, "TCDScheduler"),
        (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, "SDXL-Turbo"),
        (EulerAncestralDiscreteScheduler, {"timestep_spacing": "leading"}, ""),
    ],
)
def test_schedulers_of_few_steps_say_so(pipe: Any, kind: Any, config: dict[str, Any], told: str) -> None:
    teacher = teacher_with(pipe, kind, **config)
    why = why_guided_already(teacher, pipe)
    assert told in why and bool(told) == bool(why)
    line = guidance_warning(teacher, pipe, 7.5)
    assert (line is None) == (not told) and (line is None or ("\n" not in line and "guidance=1" in line))
    assert guidance_warning(teacher, pipe, 1.0) is None
    assert why_of_few_steps(teacher, pipe) == why


def test_a_student_of_ours_says_so_itself(pipe: Any, tmp_path: Path) -> None:
    teacher = teacher_with(pipe, EulerAncestralDiscreteScheduler, timestep_spacing="leading")
    (tmp_path / "model_index.json").write_text("{}")
    assert why_guided_already(teacher, tmp_path) == ""
    (tmp_path / "verification").mkdir()
    call = {"num_inference_steps": 1, "guidance_scale": 0.0}
    (tmp_path / "verification" / "manifest.json").write_text(json.dumps({"call": call}))
    assert "student whose folder says so" in why_guided_already(teacher, tmp_path)
    assert why_of_few_steps(teacher, tmp_path) == "its folder says that it draws in 1"


def test_a_student_of_many_steps_may_denoise_as_a_teacher_does(pipe: Any, tmp_path: Path) -> None:
    teacher = teacher_with(pipe, EulerAncestralDiscreteScheduler, timestep_spacing="leading")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "verification").mkdir()
    for steps, few in ((7, True), (8, False)):
        call = {"num_inference_steps": steps, "guidance_scale": 0.0}
        (tmp_path / "verification" / "manifest.json").write_text(json.dumps({"call": call}))
        assert bool(why_of_few_steps(teacher, tmp_path)) == few


@pytest.mark.parametrize("name", ["schnell", "flux", "sana-sprint", "klein"])
def test_nothing_is_said_where_guidance_is_an_input_or_refused(name: str) -> None:
    teacher = PipelineTeacher(tiny_pipeline(name), "cpu")
    assert guidance_warning(teacher, teacher.pipe, 4.0) is None
    assert teacher.null is None or teacher.denoiser.guidance is not None or name == "klein"
