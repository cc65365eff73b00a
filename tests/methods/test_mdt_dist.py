"""MDT-dist against the Gaussian's exact map: MeanFlow's identity at s = 0, and a field that brings samples home."""

from __future__ import annotations

import pytest
import torch
from flow_toy import MU, C, errors, from_the_teacher

from stepdistill.diffusion.path import FlowPath, per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import loss_with_gradient
from stepdistill.losses.flow_maps import teacher_velocity
from stepdistill.methods.mdt_dist import MDTDist
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, GaussianFlowMap, ToyTeacher, loss_of, toy_batch, toy_student

PATH = FlowPath()


def method_of(kind=MDTDist, mean=MU, times=(1.0,), **options):
    """From the exact Gaussian teacher to the exact map of a Gaussian elsewhere."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH)
    student = toy_student(GaussianFlowMap(mean, C), PATH, "velocity")
    return kind(Copies(teacher, student), times, kind.Options(guidance=1.0, tangent_warmup=0, **options))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def test_matching_is_the_eulerian_equation_at_jumps_to_clean_data():
    """Without the division its residual is u less MeanFlow's target, at times that are logit-normal."""
    method = method_of(mean=1.1, normalised=False, distillation_weight=0.0)
    batch = data()
    start = torch.sigmoid(1.0 + batch.draws.normal("t", ()))
    x, _, t, s, cond = method.points(batch, start, start)
    assert float(s.max()) == 0.0 and bool(((t == start) | (t == 1)).all())
    now = method.student.flow_velocity(x, t, s, cond).detach()
    error = now - method.equations.eulerian(x, t, s, cond, now)
    loss, logs = loss_of(method, "student", batch)
    torch.testing.assert_close(loss.detach(), error.square().mean())
    torch.testing.assert_close(logs["residual"], error.square().mean().sqrt())


def test_the_exact_map_is_a_fixed_point_of_both_terms_without_the_division():
    method = method_of(normalised=False)
    _, logs = loss_of(method, "student", data())
    assert float(logs["residual"]) < 2e-5 and float(logs["field"]) < 2e-5


def test_divided_the_target_stays_near_the_teachers_velocity():
    """|u* - v| is below t in the length of a whole sample, and the exact map is no fixed point."""
    method = method_of()
    assert float(loss_of(method, "student", data())[1]["residual"]) > 1e-3
    x, t = torch.randn(32, 2, 1, 1), torch.linspace(0.05, 1, 32)
    zero = torch.zeros_like(t)
    now = method.student.flow_velocity(x, t, zero, Condition()).detach()
    target = method.target(x, t, zero, Condition(), now, 1.0)
    v = teacher_velocity(method.teacher, x, t, Condition(), 1.0)
    assert bool(((target - v).flatten(1).norm(dim=1) < t).all())
    plain = method_of(normalised=False).target(x, t, zero, Condition(), now, 1.0)
    length = (plain - v).flatten(1).norm(dim=1) / t
    torch.testing.assert_close(target - v, (plain - v) / per_sample(length + 0.1, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_distillation_takes_a_shift_of_the_students_samples_back(shift):
    """The gradient in the student's mean has the sign of its shift: descent goes home."""
    method = method_of(mean=MU + shift)
    own, field = method.distillation(toy_batch(256, 3))
    loss_with_gradient(own, field).backward()
    assert float(method.student.net.mean.grad) * shift > 0.01


def test_several_steps_are_refused_as_they_make_jumps_that_are_not_learnt():
    with pytest.raises(
        UserError, match=r"student.times is \[1.0, 0.5\], .* set student.times=\[1.0\], or take"
    ) as told:
        method_of(times=(1.0, 0.5))
    assert "\n" not in str(told.value)


def test_divided_the_derivative_is_over_its_length_and_a_tenth_at_any_end():
    """u* = v - (t - s) D / (|D| + 0.1); a jump of no length learns v."""
    method = method_of(mean=1.3)
    x, t = torch.randn(32, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1, 32)
    for s in (0.5 * t, t):
        now = method.student.flow_velocity(x, t, s, Condition()).detach()
        v, _ = method.equations.along(x, t, s, Condition())
        change = v - method.equations.eulerian(x, t, s, Condition(), now)
        gap = (t - s).view(-1, 1, 1, 1)
        wanted = (
            v - change / (change.square().sum((1, 2, 3), keepdim=True).sqrt() / gap + 0.1)
            if s is not t
            else v
        )
        torch.testing.assert_close(
            method.target(x, t, s, Condition(), now, 1.0), wanted, rtol=1e-3, atol=1e-4
        )


def test_distillation_waits_for_its_update():
    method = method_of(warm_start=2, matching_alone=3)
    assert [method.distils(step) for step in (4, 5)] == [False, True]
    assert [method.phase(step) for step in (1, 2, 5)] == [
        "warm start",
        "velocity matching",
        "velocity matching, distillation",
    ]
    assert not method_of(distillation_weight=0.0).distils(100)
    alone, both = (loss_of(method, Turn("student", step), data(step=step)) for step in (4, 5))
    assert "field" not in alone[1] and "field" in both[1]


def test_the_loss_is_the_sum_of_its_terms():
    plain, half, whole = (
        loss_of(method_of(mean=1.2, distillation_weight=weight), "student", data())[0]
        for weight in (0.0, 1.0, 2.0)
    )
    torch.testing.assert_close(whole - plain, 2 * (half - plain))


def test_distillation_adds_its_weight_times_the_gradient_of_its_field():
    batch, found = data(), []
    method, plain = (method_of(mean=1.2, distillation_weight=weight) for weight in (0.7, 0.0))
    own, field = method.distillation(batch)
    term = 1.4 * loss_with_gradient(own, field)
    whole, alone = (loss_of(each, "student", batch)[0] for each in (method, plain))
    torch.testing.assert_close(whole, alone + term)
    for each, loss in ((method, whole), (plain, alone), (method, term)):
        found.append(torch.autograd.grad(loss, each.student.net.mean)[0])
    torch.testing.assert_close(found[0], found[1] + found[2])
    assert abs(float(found[2])) > 1e-3


@pytest.mark.parametrize(("middle", "last"), [(1.0, 1.0), (1.0, 0.5), (-15.0, 1.0)])
def test_the_field_is_the_velocity_less_its_target_where_the_students_samples_are_noised_anew(middle, last):
    """At times up to where drawings start, and not below the least at which the teacher is read."""
    method, batch = method_of(mean=1.2, normalised=False, time_mean=middle), data()
    own, field = method.distillation(batch)
    method.last = last
    own, field = method.distillation(batch)
    x, t = method.beginning(batch.noise)
    r = (last * torch.sigmoid(middle + batch.draws.normal("renoise t", ()))).clamp_min(method.least)
    assert bool((r == method.least).all()) == (middle < 0)
    eps, at = batch.draws.normal("renoise eps", tuple(x.shape[1:])), per_sample(r, x)
    x_r = (1 - at) * (x - per_sample(t, x) * own.detach()) + at * eps
    now = method.student.flow_velocity(x_r, r, torch.zeros_like(r), Condition()).detach()
    wanted = now - method.target(x_r, r, torch.zeros_like(r), Condition(), now, 1.0)
    torch.testing.assert_close(field, wanted, rtol=1e-4, atol=1e-5)
    assert own.requires_grad and not field.requires_grad


def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end():
    options = MDTDist.Options(
        guidance=1.0,
        tangent_warmup=0,
        normalised=False,
        noise_share=0.5,
        derivative="difference",
        derivative_step=0.1,
        source="images",
    )
    start, end = errors(from_the_teacher(MDTDist, options), steps=250)
    assert end < 0.6 * start, (start, end)
