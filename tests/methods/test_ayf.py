"""AYF on the Gaussian's exact map: the zeros of both equations, the share's bias, and tangents of bounded length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_toy import MU, C, errors, from_the_teacher

from stepdistill.diffusion.path import FlowPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Examples
from stepdistill.losses.contract import Turn
from stepdistill.losses.flow_maps import logit_normal
from stepdistill.methods.ayf import AYF
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, GaussianFlowMap, ToyTeacher, loss_of, toy_batch, toy_student

PATH, NONE, NULL = FlowPath(), Condition(), 0.2
WHOLE = {"tangent_warmup": 0, "largest_share": 1.0, "derivative": "exact"}


def method_of(mean=MU, **options):
    """From the exact Gaussian teacher, without a prompt of another mean, to the exact map of a Gaussian."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, NULL, C))
    student = toy_student(GaussianFlowMap(mean, C), PATH, "velocity")
    return AYF(Copies(teacher, student), (1.0,), AYF.Options(**{"guidance": 1.0, **WHOLE, **options}))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def points(method, batch):
    a, b = (logit_normal(batch.draws, name, -0.8, 1.0) for name in ("a", "b"))
    return method.points(batch, a, b)


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_the_exact_map_is_a_zero_of_either_equation_and_no_other_is(objective):
    for mean, (low, high) in ((MU, (0, 1e-3)), (MU + 0.3, (0.05, 10))):
        residual = loss_of(method_of(mean, objective=objective), "student", data())[1]["residual"]
        assert low <= float(residual) < high


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_descent_takes_a_shift_of_the_map_back(objective, shift):
    method = method_of(MU + shift, objective=objective)
    loss_of(method, "student", data(256))[0].backward()
    assert float(method.student.net.mean.grad) * shift > 1e-3


def test_a_share_below_one_is_a_pull_towards_straight_trajectories():
    """At the exact map the tangent is then (1 - r) (v - u): the zero is another one."""
    method, batch = method_of(), data()
    x, _, t, s, cond = points(method, batch)
    u, v = method.student.flow_velocity(x, t, s, cond).detach(), method.velocity(x, t, cond)
    for r in (0.0, 0.6):
        torch.testing.assert_close(
            method.tangent(x, t, s, cond, u, r), (1 - r) * (v - u), rtol=1e-3, atol=1e-4
        )
    other = method_of(1.2)
    now = other.student.flow_velocity(x, t, s, cond).detach()
    torch.testing.assert_close(other.tangent(x, t, s, cond, now, 0.0), v - now)  # flow matching


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_a_jump_without_length_is_flow_matching(objective):
    method = method_of(1.2, objective=objective)
    x, _, t, _, cond = points(method, data())
    now = method.student.flow_velocity(x, t, t, cond).detach()
    torch.testing.assert_close(method.tangent(x, t, t, cond, now, 1.0), method.velocity(x, t, cond) - now)


def test_jumps_to_data_are_continuous_time_consistency():
    """At s = 0 the tangent is that of f = x - t u along the teacher's trajectory: (f(y, m) - f(x, t)) / (m - t)."""
    method = method_of(1.2)
    x, _, t, _, cond = points(method, data())
    t = t.clamp(0.2, 0.9)
    zero = torch.zeros_like(t)

    def clean(x, t):
        return x - per_sample(t, x) * method.student.flow_velocity(x, t, zero, cond).detach()

    h, v = 1e-2, method.velocity(x, t, cond)
    rate = (clean(x + h * v, t + h) - clean(x - h * v, t - h)) / (2 * h)
    now = method.student.flow_velocity(x, t, zero, cond).detach()
    torch.testing.assert_close(method.tangent(x, t, zero, cond, now, 1.0), rate, rtol=2e-2, atol=5e-3)


def test_tangents_are_divided_by_their_length():
    """The gradient in u is -2 g over the batch, |g| = |T| / (|T| + c) < 1, and the loss its square."""
    method, batch = method_of(1.5, tangent_offset=0.3), data()
    x, _, t, s, cond = points(method, batch)
    now = method.student.flow_velocity(x, t, s, cond)
    length = method.tangent(x, t, s, cond, now.detach(), 1.0).flatten(1).norm(dim=1)
    loss, logs = loss_of(method, "student", batch)
    torch.testing.assert_close(loss.detach(), (length / (length + 0.3)).square().mean(), rtol=1e-4, atol=1e-5)
    assert float(logs["residual"]) == pytest.approx(float((length.square().mean() / 2).sqrt()), rel=1e-4)


def test_a_length_is_of_all_values_of_a_picture():
    shape, count = (2, 2, 2), 16
    batch = toy_batch(count)
    z = batch.draws.normal("pair", shape)
    batch = replace(batch, shape=shape, pairs=Examples(MU + C * z, NONE, z))
    method = method_of(1.5)
    x, _, t, s, cond = points(method, batch)
    now = method.student.flow_velocity(x, t, s, cond)
    length = method.tangent(x, t, s, cond, now, 1.0).square().sum((1, 2, 3)).sqrt()
    loss, _ = loss_of(method, "student", batch)
    torch.testing.assert_close(loss.detach(), (length / (length + 0.1)).square().mean(), rtol=1e-4, atol=1e-5)


def test_guidance_is_plain_at_one_and_moves_the_mean():
    x, t = torch.randn(8, 2, 1, 1), torch.full((8,), 0.6)
    plain = ToyTeacher(Gaussian(PATH, MU, C), PATH).predict(x, t, NONE).velocity
    torch.testing.assert_close(method_of().velocity(x, t, NONE), plain)
    guided = method_of(mean=NULL + 3 * (MU - NULL), guidance=3.0)
    assert float(loss_of(guided, "student", data())[1]["residual"]) < 1e-4


@pytest.mark.parametrize("objective", ["eulerian", "lagrangian"])
def test_a_weaker_teachers_guided_map_is_learnt(objective):
    """Of Gaussians of one deviation l takes the mean to weak + l (strong - weak), whose map is the zero."""
    for mean, (low, high) in ((0.5 + 2.5 * (MU - 0.5), (0, 1e-3)), (MU, (0.05, 10))):
        method = method_of(mean=mean, objective=objective, autoguidance=2.5)
        method.roles.route = replace(method.roles.route, weak=ToyTeacher(Gaussian(PATH, 0.5, C), PATH))
        assert low <= float(loss_of(method, "student", data())[1]["residual"]) < high
    assert AYF.weak_teacher


def test_half_of_the_jumps_to_data_end_where_the_teacher_is_read_by_the_lagrangian_equation_alone():
    for objective in ("eulerian", "lagrangian"):
        method, batch, ends = method_of(objective=objective, time_deviation=100.0), data(), []
        own = method.student.flow_velocity
        method.student.flow_velocity = lambda x, t, s, cond, own=own, ends=ends: (
            ends.append(s) or own(x, t, s, cond)
        )
        loss_of(method, "student", batch)
        _, _, t, s, _ = method.points(batch, *(logit_normal(batch.draws, n, -0.8, 100.0) for n in ("a", "b")))
        wanted = method.read_ends(batch.draws, t, s)
        assert torch.equal(ends[0], wanted if objective == "lagrangian" else s) and not torch.equal(s, wanted)


def test_the_share_rises_after_the_warm_start():
    method = method_of(warm_start=10, tangent_warmup=100, largest_share=0.99)
    assert [method.share(step) for step in (10, 60, 500)] == pytest.approx([0.0, 0.495, 0.99])
    assert not loss_of(method, Turn("student", 9), data())[1]
    assert method_of(largest_share=0.5).share(0) == 0.5


def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end():
    options = AYF.Options(
        guidance=1.0,
        tangent_warmup=50,
        source="images",
        derivative="difference",
        derivative_step=0.1,
    )
    start, end = errors(from_the_teacher(AYF, options), steps=400)
    assert end < 0.6 * start, (start, end)
