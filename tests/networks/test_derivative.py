"""Directional derivatives of diffusers' networks against float64 differences, and the automatic choice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.networks.derivative import Derivative, directional_derivative
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]
NETWORKS = ("unet-ddpm", "sd", "sdxl", "sd3", "dit")
"""UNet2DModel with attention, UNet2DConditionModel, SD3Transformer2DModel, DiTTransformer2DModel in eval."""


def case(teacher: PipelineTeacher, count: int = 3) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """x, t, a tangent of x and conditions for the tiny teacher."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, count, *teacher.codec.shape, generator=generator)
    t = torch.tensor([0.2, 0.1003, 0.0507])[:count]
    texts = ["a red heart", "fish", "star"] if teacher.family.has_prompts else ["0", "1", "0"]
    return x, t, w, teacher.codec.encode(texts[:count])


def in_double(
    teacher: PipelineTeacher, cond: Condition, net: nn.Module
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network in float64, called past the wrapper that rounds to float32."""
    wide = Condition({k: v.double() if v.is_floating_point() else v for k, v in cond.tensors.items()})
    double = copy.deepcopy(net).double()
    return lambda x, t: teacher.family.call(double, x, 1000 * t, wide)


def five_points(fn: Any, x: Tensor, t: Tensor, w: Tensor, h: float) -> Tensor:
    """The difference of fourth order along (w, 1)."""
    at = {k: fn(x + k * h * w, t + k * h) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_derivative_is_that_of_float64_differences(name: str, teacher_of: Teachers) -> None:
    """Through fused attention and GroupNorm as diffusers calls them, in float32, along state and time at once."""
    teacher = teacher_of(name)
    x, t, w, cond = case(teacher)
    net = teacher.denoiser.net
    call = lambda x, t: teacher.family.call(net, x, 1000 * t, cond)  # noqa: E731
    exact = directional_derivative(call, (x, t), (w, torch.ones_like(t)))
    with torch.no_grad():
        wanted = five_points(in_double(teacher, cond, net), x.double(), t.double(), w.double(), 1e-4)
    assert not exact.requires_grad
    # With h = 2e-4 the reference itself is 3e-3 off on SDXL and 14 times closer at half of it: fourth-order truncation.
    assert relative(exact.double(), wanted) < 5e-4
    # Along the state alone the differences that training would take agree as well: no 1000 t in it.
    zero = torch.zeros_like(t)
    near = directional_derivative(call, (x, t), (w, zero), "difference")
    assert relative(near, directional_derivative(call, (x, t), (w, zero))) < 5e-3


def test_without_the_rerouting_there_is_no_derivative(teacher_of: Teachers) -> None:
    """What the function is for: torch.func.jvp alone refuses the fused attention of every network."""
    teacher = teacher_of("sd3")
    x, t, w, cond = case(teacher)
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda x: teacher.denoiser.raw(x, t, cond), (x,), (w,))


@pytest.mark.parametrize("name", ["unet-ddpm", "sd3"])
def test_it_works_with_gradient_checkpointing_inside_and_around(name: str, teacher_of: Teachers) -> None:
    """The network's own checkpointing on, and the whole loss under checkpoint: same derivative, same gradients."""
    teacher = teacher_of(name)
    x, t, w, cond = case(teacher)
    student = Student.from_teacher(teacher)
    derivative = Derivative("exact")

    def loss(x: Tensor) -> Tensor:
        rate = derivative(lambda x, t: student.raw(x, t, cond), (x, t), (w, torch.ones_like(t)))
        return (student.raw(x, t, cond) - rate).square().mean()

    def gradients(how: Callable[[], Tensor]) -> list[Tensor]:
        student.net.zero_grad()
        how().backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in student.net.parameters() if p.grad is not None]

    plain = gradients(lambda: loss(x))
    around = gradients(lambda: checkpoint(loss, x, use_reentrant=False))
    student.net.enable_gradient_checkpointing()  # type: ignore[operator]
    student.net.train()
    inside = gradients(lambda: loss(x))
    for one, two, three in zip(plain, around, inside, strict=True):
        assert torch.equal(one, two)
        # Train mode runs the blocks again in backward: sums in another order.
        assert float((three - one).norm()) <= 1e-4 * float(one.norm()) + 1e-6


def cubic(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return per_sample(t**3, x) * x.square() + per_sample(s.square(), x) * x


def test_differences_are_of_second_order_inside_and_never_leave_the_interval() -> None:
    x, w = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 1.0, 0.4, 1.0], dtype=torch.float64)
    s = torch.tensor([0.2, 0.0, 0.4, 1.0], dtype=torch.float64)
    along_t = (w, torch.ones_like(t), torch.zeros_like(s))
    along_s = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(s))
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.append((t, s))
        return cubic(x, t, s)

    for tangents in (along_t, along_s):
        exact = directional_derivative(cubic, (x, t, s), tangents)
        errors = [
            (directional_derivative(watched, (x, t, s), tangents, "difference", h) - exact)
            .flatten(1)
            .norm(dim=1)
            for h in (1e-2, 5e-3)
        ]
        assert float(errors[0].max()) < 0.3  # also where t = s at an end of time, and no step is in order
        orders = (errors[0] / errors[1].clamp_min(1e-14)).log2()
        if tangents is along_t:
            assert abs(float(orders[0]) - 2) < 0.1  # inside; linear in x, so the rest is one-sided
        assert all(float(order) > 0.9 for order, e in zip(orders, errors[0], strict=True) if float(e) > 1e-9)
    for t_seen, s_seen in seen:
        for value in (t_seen, s_seen):
            assert bool(((value >= 0) & (value <= 1)).all())
        assert bool((t_seen[:3] >= s_seen[:3]).all())  # the last has t = s = 1 and nowhere to go in order


def test_differences_stay_before_the_last_time() -> None:
    """Where a network is only read up to 0.9, a difference at 0.9 looks back, and one beyond it would see no change."""
    x, t = torch.ones(2, 1, 1, 1, dtype=torch.float64), torch.tensor([0.9, 0.5], dtype=torch.float64)

    def held(x: Tensor, t: Tensor) -> Tensor:
        return per_sample(t.clamp_max(0.9) ** 2, x) * x

    args = (held, (x, t), (torch.zeros_like(x), torch.ones_like(t)), "difference", 0.1)
    rate = directional_derivative(*args, last=0.9).flatten()
    torch.testing.assert_close(rate, torch.tensor([1.7, 1.0], dtype=torch.float64))
    assert float(directional_derivative(*args)[0]) == pytest.approx(0.85)  # half of it is beyond the end
    one = torch.ones(1, dtype=torch.float64)  # by itself it stays before 1: (1 - 0.9^2) / 0.1
    assert float(Derivative("difference", 0.1)(torch.square, (one,), (one,))) == pytest.approx(1.9)


def test_a_difference_is_central_where_it_just_fits() -> None:
    """Of t^2 the central one is 2 t, and a one-sided one off by h: from t - h = 0, to t + h = 1, and from t - h = s."""
    x, w = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    t, s = torch.tensor([0.25, 0.75, 0.5]), torch.tensor([0.0, 0.0, 0.25])
    args = (x, t, s), (w, torch.ones(3), torch.zeros(3))
    square = lambda x, t, s: per_sample(t.square(), x) * x  # noqa: E731
    rate = directional_derivative(square, *args, "difference", 0.25)
    torch.testing.assert_close(rate.flatten(), 2 * t, atol=0, rtol=1e-6)
    held = nn.Parameter(torch.ones(()))
    for way in ("exact", "difference"):
        along = directional_derivative(lambda x, t, s: held * square(x, t, s), *args, way)  # type: ignore[arg-type]
        assert not along.requires_grad


@pytest.mark.parametrize(("at", "moves", "seen"), [(0.0, "end", 0.1), (1.0, "start", 0.9)])
def test_at_an_end_of_time_a_jump_of_no_length_is_read_inside_though_out_of_order(
    at: float, moves: str, seen: float
) -> None:
    """s = t = 0 can only let s pass t, and t = s = 1 only t pass s: nothing is read at negative times or above 1."""
    x, t = torch.ones(1, 1, 1, 1), torch.full((1,), at)
    read: list[float] = []

    def square(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        read.extend((float(t), float(s)))
        return per_sample((s if moves == "end" else t).square(), x) * x

    one, none = torch.ones(1), torch.zeros(1)
    tangents = (0 * x, none, one) if moves == "end" else (0 * x, one, none)
    rate = directional_derivative(square, (x, t, t), tangents, "difference", 0.1)
    assert sorted(set(read)) == pytest.approx(sorted((at, seen)))
    assert float(rate) == pytest.approx((at**2 - seen**2) / (at - seen), rel=1e-5)


def test_tangents_belong_to_their_primals() -> None:
    """d f(x, t, s) along (w, 1, 0), and not along (w, 0, 1)."""
    x, w = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    t, s = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    one, zero = torch.ones(4), torch.zeros(4)
    wanted = (
        per_sample(3 * t**2, x) * x.square() + (2 * per_sample(t**3, x) * x + per_sample(s.square(), x)) * w
    )
    torch.testing.assert_close(directional_derivative(cubic, (x, t, s), (w, one, zero)), wanted)
    assert relative(directional_derivative(cubic, (x, t, s), (w, zero, one)), wanted) > 0.1


def test_auto_compares_once_and_says_so(teacher_of: Teachers, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = teacher_of("unet-ddpm")
    x, t, w, cond = case(teacher)
    derivative = Derivative("auto")
    call = lambda x: teacher.denoiser.raw(x, t, cond)  # noqa: E731
    assert derivative.logs() == {}
    first = derivative(call, (x,), (w,))
    assert derivative.way == "exact"
    assert derivative.gap is not None and 0 < derivative.gap < 1e-2
    assert "finite differences with h = 0.005 differ by" in capsys.readouterr().err
    assert torch.equal(first, derivative(call, (x,), (w,)))
    assert capsys.readouterr().err == ""
    assert float(derivative.logs()["derivative_gap"]) == pytest.approx(derivative.gap)


class NoForwardMode(torch.autograd.Function):
    """x^2 without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()


def test_auto_takes_differences_where_there_is_no_rule(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.linspace(-1, 1, 8).reshape(4, 2, 1, 1)
    derivative = Derivative("auto")
    rate = derivative(lambda x: NoForwardMode.apply(x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(rate, 2 * x, atol=1e-4, rtol=1e-3)
    assert derivative.way == "difference" and derivative.logs() == {}
    assert "finite differences, as the exact one cannot be had" in capsys.readouterr().err


def test_autocast_does_not_reach_the_derivative(teacher_of: Teachers) -> None:
    teacher = teacher_of("sd")
    x, t, w, cond = case(teacher)
    call = lambda x: teacher.denoiser.raw(x, t, cond)  # noqa: E731
    for way in ("exact", "difference"):
        plain = directional_derivative(call, (x,), (w,), way)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(directional_derivative(call, (x,), (w,), way), plain)  # type: ignore[arg-type]
