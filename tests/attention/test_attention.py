"""Attention kernels by name give one network's answer, and are refused with the reason where they cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_prompts

from stepdistill.attention.kernels import NAMES, attention, check_attention, use_xformers, why_not
from stepdistill.errors import UserError
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["unet-classes", "dit", "sd", "sd3"])
def test_kernels_agree(name: str, teacher_of: Callable[[str], PipelineTeacher]) -> None:
    teacher = teacher_of(name)
    student = Student.from_teacher(teacher)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *teacher.codec.shape, generator=generator)
    t, cond = torch.tensor([0.8, 0.3]), teacher.codec.encode(tiny_prompts(name, 2))
    outputs, gradients = [], []
    for kernel in ("sdpa", "math"):
        student.net.zero_grad()
        with attention(kernel, CPU):
            output = student.raw(x_t, t, cond)
            output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append(
            torch.cat([v.grad.flatten() for v in student.net.parameters() if v.grad is not None])
        )
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max().clamp_min(1)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max().clamp_min(1)


def test_what_runs_on_a_cpu() -> None:
    assert [name for name in NAMES if why_not(name, CPU) is None] == ["sdpa", "math"]
    for name in ("sdpa", "math"):
        check_attention(name, CPU)


def test_xformers_is_refused_on_a_cpu_with_the_reason() -> None:
    installed = importlib.util.find_spec("xformers") is not None
    reason = "no kernel for cpu" if installed else "not installed"
    with pytest.raises(
        UserError, match=f"train.attention is xformers, but .*{reason}.*choose one of sdpa, math"
    ):
        check_attention("xformers", CPU)
    with pytest.raises(UserError, match="choose one of sdpa, math"), attention("xformers", CPU):
        pass


def test_xformers_needs_a_diffusers_network() -> None:
    with pytest.raises(UserError, match="needs a diffusers network, not Linear"):
        use_xformers(torch.nn.Linear(1, 1))


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("xformers") is None,
    reason="xformers' kernels need a CUDA device and the package",
)
def test_xformers_agrees_on_a_gpu(teacher_of: Callable[[str], PipelineTeacher]) -> None:
    teacher = teacher_of("sd")
    student = Student.from_teacher(teacher).cuda()
    x_t = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0)).cuda()
    t, cond = (
        torch.tensor([0.8, 0.3]).cuda(),
        teacher.codec.encode(tiny_prompts("sd", 2)).to(torch.device("cuda")),
    )
    with torch.no_grad(), attention("math", torch.device("cuda")):
        plain = student.raw(x_t, t, cond)
    use_xformers(student.net)
    with torch.no_grad(), attention("xformers", torch.device("cuda")):
        fused = student.raw(x_t, t, cond)
    assert (plain - fused).abs().max() < 1e-4
