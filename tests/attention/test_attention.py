"""Attention kernels by name give one network's answer, and are refused with the reason where they cannot run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_prompts

from stepdistill.attention import dispatcher
from stepdistill.attention.forward_mode import forward_mode
from stepdistill.attention.kernels import NAMES, attention, check_attention, fit_attention, told, why_not
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
    assert [name for name in NAMES if why_not(name, CPU) is None] == ["auto", "sdpa", "math"]
    for name in ("auto", "sdpa", "math", "native", "_native_flash", "_native_math"):
        check_attention(name, CPU)


def test_xformers_is_refused_on_a_cpu_with_the_reason() -> None:
    installed = importlib.util.find_spec("xformers") is not None
    reason = "no kernel for cpu" if installed else "not installed"
    with pytest.raises(
        UserError, match=f"train.attention is xformers, but .*{reason}.*choose one of auto, sdpa, math"
    ):
        check_attention("xformers", CPU)
    with pytest.raises(UserError, match="choose one of auto, sdpa, math"), attention("xformers", CPU):
        pass


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash_hub", "downloads code and runs it, which takes DIFFUSERS_TRUST_REMOTE_KERNELS=true"),
        ("_native_npu", "install `torch_npu`"),
        ("_native_efficient", "does not train on cpu in float32: No "),
        ("flex", "does not train on cpu in float32: .*backward"),
        ("flash_5", "no kernel is called so; stepdistill doctor lists"),
    ],
)
def test_backends_of_the_dispatcher_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"train.attention is {name}, but .*{reason}.*auto, sdpa, math"):
        check_attention(name, CPU)


@pytest.mark.parametrize(
    ("name", "asks"), [("flux", True), ("wan", True), ("sd", False), ("dit", False), ("sd3", False)]
)
def test_networks_that_do_not_ask_the_dispatcher_are_refused(
    name: str, asks: bool, teacher_of: Callable[[str], PipelineTeacher]
) -> None:
    net = teacher_of(name).denoiser.net
    fit_attention("math", net, CPU)
    if asks:
        fit_attention("_native_math", net, CPU)
        return
    with pytest.raises(UserError, match=f"{type(net).__name__} does not ask.*one of auto, sdpa, math"):
        fit_attention("_native_math", net, CPU)


def test_a_backend_of_the_dispatcher_is_used_and_left_behind(
    teacher_of: Callable[[str], PipelineTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within an exact derivative the dispatcher's kernel gives way to what has a forward-mode rule."""
    from diffusers.models import attention_dispatch

    kinds = attention_dispatch.AttentionBackendName
    registry = attention_dispatch._AttentionBackendRegistry
    plain, calls = registry._backends[kinds._NATIVE_MATH], []
    monkeypatch.setitem(
        registry._backends,
        kinds._NATIVE_MATH,
        lambda *args, **more: (calls.append(1), plain(*args, **more))[1],
    )
    teacher = teacher_of("flux")
    x = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([0.5]), teacher.codec.encode(tiny_prompts("flux", 1))
    with torch.no_grad():
        wanted = teacher.denoiser.raw(x, t, cond)
        assert not calls
        with attention("_native_math", CPU):
            found = teacher.denoiser.raw(x, t, cond)
            assert calls and torch.allclose(found, wanted, rtol=0, atol=1e-5)
            calls.clear()
            with forward_mode():
                teacher.denoiser.raw(x, t, cond)
    assert not calls and registry.get_active_backend()[0] == kinds.NATIVE


def test_a_backend_without_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    kinds, backends = (
        attention_dispatch.AttentionBackendName,
        attention_dispatch._AttentionBackendRegistry._backends,
    )
    monkeypatch.setitem(backends, kinds._NATIVE_MATH, lambda query, key, value, **more: query.detach())
    assert dispatcher.why_not.__wrapped__("_native_math", CPU, "float32") == "it has no gradients"


def test_auto_says_what_it_is() -> None:
    assert told("auto", CPU, False) == "attention: sdpa on cpu"
    assert "derivatives by our own in tiles" in told("auto", CPU, True)


def test_xformers_needs_a_diffusers_network() -> None:
    with pytest.raises(UserError, match="needs a diffusers network, not Linear"):
        fit_attention("xformers", torch.nn.Linear(1, 1), CPU)


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
    fit_attention("xformers", student.net, torch.device("cuda"))
    with torch.no_grad(), attention("xformers", torch.device("cuda")):
        fused = student.raw(x_t, t, cond)
    assert (plain - fused).abs().max() < 1e-4
