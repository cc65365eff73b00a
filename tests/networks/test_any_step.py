"""Wan's network in the class that is told both ends of a jump: what it is at the start, and what a student becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, tiny_pipeline

import stepdistill
from stepdistill.errors import UserError
from stepdistill.families._any_step import is_any_step
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.roles import Adapters
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher


@pytest.fixture(scope="module")
def teacher() -> PipelineTeacher:
    return PipelineTeacher(tiny_pipeline("wan"), size=SIZES["wan"])


def student_of(teacher: PipelineTeacher) -> Student:
    student = Student.from_teacher(teacher)
    student.add_second_time("stock")
    return student


def states(teacher: PipelineTeacher, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *teacher.codec.shape, generator=generator)


def test_where_a_jump_has_no_length_it_says_what_the_teacher_says(teacher: PipelineTeacher) -> None:
    student, x, t = student_of(teacher), states(teacher), torch.tensor([0.9, 0.4])
    cond = teacher.codec.encode(["a dog", "a cat"])
    assert is_any_step(student.net) and student.two_times
    with torch.no_grad():
        own = teacher.denoiser.raw(x, t, cond)
        torch.testing.assert_close(student.raw(x, t, cond, t), own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.raw(x, t, cond), own, rtol=1e-4, atol=1e-5)
        assert float((student.raw(x, t, cond, t / 2) - own).abs().max()) > 1e-4


def test_it_hears_the_end_of_a_jump_at_its_own_time_as_diffusers_pipeline_says_it(
    teacher: PipelineTeacher,
) -> None:
    """Every frame is told both times: t and s through the teacher's clock."""
    student, x, t, s = (
        student_of(teacher),
        states(teacher),
        torch.tensor([0.9, 0.4]),
        torch.tensor([0.5, 0.0]),
    )
    cond, seen = teacher.codec.encode(["a dog", "a cat"]), dict[str, torch.Tensor]()

    def look(net: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        seen.update(kwargs)

    handle = student.net.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        student.raw(x, t, cond, s)
    handle.remove()
    frames = x.shape[2]
    assert torch.equal(seen["hidden_states"], x.transpose(1, 2))
    torch.testing.assert_close(seen["timestep"], 1000 * t[:, None].expand(-1, frames))
    torch.testing.assert_close(seen["r_timestep"], 1000 * s[:, None].expand(-1, frames))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["meanflow", "anyflow"])
def test_a_student_is_a_stock_pipeline_that_draws_in_any_number_of_steps(method: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\ndog\n")
    size = SIZES["wan"]
    run = stepdistill.distill(
        tiny_pipeline("wan"),
        method,
        tmp_path / "run",
        sets=[
            *(
                "train.batch=2",
                "train.updates=2",
                "train.lr=1e-2",
                "train.average=0",
                "train.preview_every=0",
            ),
            *("evaluate=false", "options.guidance=2", "options.pairs=2", "options.pair_steps=2"),
            *(
                f"data.prompts={tmp_path / 'prompts.txt'}",
                f"data.size={[size.height, size.width, size.frames]}",
            ),
            *("options.second_time=stock", "student.steps=4"),
            *(["options.derivative=difference"] if method == "meanflow" else ["options.counts=[1,2]"]),
        ],
    )
    index = json.loads((run.student / "model_index.json").read_text())
    assert index["_class_name"] == "AnyFlowPipeline"
    assert index["transformer"] == ["diffusers", "AnyFlowTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    assert "drawn in 4 step(s) of" in run.report.verification
    manifest = json.loads((run.student / "verification" / "manifest.json").read_text())
    assert manifest["step_counts"] == [1, 2, 4]
    pipe, _ = load_pipeline(run.student)
    call = {**manifest["call"], "prompt": ["dog"], "num_inference_steps": 2, "output_type": "np"}
    drawn = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    assert drawn.shape[1] == size.frames and bool(torch.isfinite(torch.as_tensor(drawn)).all())
    again = PipelineTeacher(pipe, size=size)  # as its fine-tuning would take it
    x, t, cond = states(again), torch.tensor([0.9, 0.4]), again.codec.encode(["dog", "dog"])
    assert torch.equal(
        again.predict(x, t, cond).x0, again.path.read(again.denoiser.raw(x, t, cond, t), "velocity", x, t).x0
    )


def test_what_has_no_such_class_says_so(teacher: PipelineTeacher) -> None:
    for name, says in (
        ("sd3", "needs a WanTransformer3DModel, .* not a SD3Transformer2DModel"),
        ("wan-2.2", "second_time=stock is of one network, but this teacher has 2"),
    ):
        other = Student.from_teacher(PipelineTeacher(tiny_pipeline(name), size=SIZES.get(name)))
        with pytest.raises(UserError, match=says):
            other.add_second_time("stock")
    with pytest.raises(UserError, match="is another network class, which a LoRA cannot hold"):
        Adapters(teacher, 2).student.add_second_time("stock")
    odd = Student.from_teacher(teacher)
    odd.net.register_to_config(image_dim=16)  # type: ignore[operator]
    with pytest.raises(UserError, match="this one has image_dim = 16"):
        odd.add_second_time("stock")
