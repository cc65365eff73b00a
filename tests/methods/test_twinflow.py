"""TwinFlow between Gaussians: the recursive target at the exact map, the twin's direction, and the batch's parts."""

from __future__ import annotations

import math

import pytest
import torch
from flow_toy import MU, C, Twinned

from stepdistill.diffusion.path import FlowPath, per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.losses.distances import robust
from stepdistill.losses.flow_maps import teacher_velocity
from stepdistill.losses.twin import twin_prediction
from stepdistill.methods.twinflow import TwinFlow
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

PATH, NONE = FlowPath(), Condition()


def method_of(net=None, **options):
    """From the exact Gaussian teacher to a student that is its exact map."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH)
    student = toy_student(net or GaussianFlowMap(MU, C), PATH, "velocity")
    return TwinFlow(Copies(teacher, student), (1.0,), TwinFlow.Options(guidance=1.0, **options))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def jumps(count=64, least=0.02):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, *SHAPE, generator=generator)
    t = torch.linspace(0.1, 1.0, count)
    return x, t, (t - least) * torch.rand(count, generator=generator)


def velocity(method, x, t):
    return teacher_velocity(method.teacher, x, t, NONE, 1.0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_exact_map_is_its_own_target_up_to_the_legs_square(order, monkeypatch):
    """A straight leg of length h is off the trajectory by h^2, the target by h; and not where the map is another."""
    method = method_of(order=order)
    x, t, s = jumps()
    v = velocity(method, x, t)
    now = method.student.flow_velocity(x, t, s, NONE).detach()
    far = float((method.wanted(x, v, t, s, NONE, now) - now).abs().max()) * 0.01
    assert 0 < far < 20 * 0.01**2
    monkeypatch.setattr("stepdistill.methods.twinflow.LEG", 0.005)
    near = float((method.wanted(x, v, t, s, NONE, now) - now).abs().max()) * 0.005
    assert near == pytest.approx(far / 4, rel=0.1)
    other = method_of(GaussianFlowMap(MU + 0.3, C), order=order)
    wrong = other.student.flow_velocity(x, t, s, NONE).detach()
    assert float((other.wanted(x, v, t, s, NONE, wrong) - wrong).abs().mean()) > 0.1


def test_at_order_one_it_is_the_eulerian_quotient():
    """F + (X(x, t, s) - X(y, t - h, s)) / h with y = x - h v, within 1."""
    method = method_of(Perceptron(seed=3), order=1)
    x, t, s = jumps()
    u, v = method.student.flow_velocity, velocity(method, x, t)
    now, h = u(x, t, s, NONE).detach(), 0.01
    y = x - h * v
    ends = (x - per_sample(t - s, x) * now, y - per_sample(t - h - s, x) * u(y, t - h, s, NONE))
    wanted = now + ((ends[0] - ends[1]) / h).clamp(-1, 1)
    found = method.wanted(x, v, t, s, NONE, now)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-3)
    assert float((found - now).abs().max()) == pytest.approx(1.0, abs=1e-5)


def test_jumps_within_the_leg_learn_the_velocity():
    method = method_of(Perceptron(seed=3))
    x, t, _ = jumps()
    v = velocity(method, x, t)
    for length in (0.0, 0.004):
        now = method.student.flow_velocity(x, t, t - length, NONE).detach()
        wanted = now - (now - v).clamp(-1, 1) if length else v
        torch.testing.assert_close(
            method.wanted(x, v, t, t - length, NONE, now), wanted, rtol=1e-3, atol=1e-3
        )


def test_a_twin_that_is_real_moves_nothing():
    method, (x, t, _) = method_of(Twinned(MU, C)), jumps()
    assert float(method.field(x, t, NONE).abs().max()) == 0
    by_teacher = method_of(Twinned(MU, C), velocity="teacher")
    assert float(by_teacher.field(x, t, NONE).abs().max()) < 1e-4
    one_step = loss_of(method_of(Twinned(MU, C), parts=(1, 0, 0, 0)), "student", data())
    without = loss_of(method_of(Twinned(MU, C), parts=(1, 0, 0, 0), rectify=0.0), "student", data())
    torch.testing.assert_close(one_step[0], without[0])


@pytest.mark.parametrize("shift", [0.2, -0.2, 4.0, -4.0])
def test_the_twins_difference_takes_a_shift_of_the_samples_back(shift):
    """F_twin - F_real = -(x0_twin - x0_real) / t, and descent of its loss goes home."""
    method = method_of(Twinned(MU + shift, C), velocity="teacher", parts=(1, 0, 0, 0))
    x, t, _ = jumps()
    field = method.field(x, t, NONE)
    twin, real = twin_prediction(method.student, x, t, NONE).x0, method.teacher.predict(x, t, NONE).x0
    torch.testing.assert_close(field, (-(twin - real) / per_sample(t, x)).clamp(-1, 1), rtol=1e-3, atol=1e-4)
    plain, rectified = (
        torch.autograd.grad(loss_of(m, "student", data(256))[0], m.student.net.mean)[0]
        for m in (
            method_of(Twinned(MU + shift, C), velocity="teacher", parts=(1, 0, 0, 0), rectify=weight)
            for weight in (0.0, 1.0)
        )
    )
    assert float(rectified - plain) * shift > 0.01


def test_the_parts_have_their_sizes_and_their_jumps():
    method = method_of(parts=(1, 2, 3, 4))
    batch = data(4000)
    part = method.part(batch.draws)
    shares = [float((part == i).float().mean()) for i in range(4)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    a, b = (batch.draws.uniform(name, method.least, method.last) for name in ("a", "b"))
    x, _, t, s, _ = method.points(batch, a, b)
    assert bool((s <= t).all()) and bool((t[part == 0] == 1).all()) and bool((s[part == 0] == 0).all())
    short = (s / t)[part == 1]
    assert 0.95 <= float(short.min()) < 0.96 and 0.99 < float(short.max()) <= 1
    torch.testing.assert_close(
        torch.stack([t, s])[:, part == 2], torch.stack([a.maximum(b), a.minimum(b)])[:, part == 2]
    )
    torch.testing.assert_close(x[part == 0], batch.draws.normal("eps", SHAPE)[part == 0])
    assert bool((method_of(parts=(0, 0, 0, 1)).part(batch.draws) == 3).all())
    assert bool((method_of(parts=(1, 0, 0, 0)).part(batch.draws) == 0).all())


def test_the_twin_learns_the_students_one_step_samples():
    """Those of the batch's own noise and prompts, noised anew."""
    method, batch = method_of(Twinned(1.1, C), parts=(0, 0, 0, 1)), data(4000)
    loss, logs = loss_of(method, "student", batch)
    torch.testing.assert_close(loss, logs["twin"])
    x0 = 1.1 + C * batch.noise
    x_r, eps, r = method.noised_anew(batch, "twin", x0, torch.arange(4000))
    said = twin_prediction(method.student, x_r, r, NONE).velocity
    torch.testing.assert_close(loss, robust(said - (eps - x0)).mean())


def test_a_jumps_weight_falls_with_its_length():
    """tan((1 - (t - s)) pi / 2.5) + 1: 1 for one step."""
    method, batch = method_of(Perceptron(seed=3), parts=(0, 0, 1, 0)), data()
    a, b = (batch.draws.uniform(name, method.least, method.last) for name in ("a", "b"))
    x, x0, t, s, _ = method.points(batch, a, b)
    now = method.student.flow_velocity(x, t, s, NONE)
    error = now - method.wanted(x, (x - x0) / per_sample(t, x), t, s, NONE, now.detach())
    weight = torch.tan((1 - (t - s)) * math.pi / 2.5) + 1
    torch.testing.assert_close(loss_of(method, "student", batch)[0], (weight * robust(error)).mean())


def test_robust_is_a_root_with_twice_its_gradient():
    e = torch.randn(5, *SHAPE, requires_grad=True)
    root = (e.flatten(1).square().mean(1) + 1e-6).sqrt()
    wanted = torch.autograd.grad(2 * root.sum(), e, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(robust(e).sum(), e)[0], wanted)
    size = e.flatten(1).square().mean(1)
    torch.testing.assert_close(robust(e, 0.5), size / (size + 0.25).sqrt())


def test_by_data_no_teacher_is_called_and_the_average_makes_the_jumps():
    method = method_of(Twinned(MU, C), parts=(1, 1, 1, 1))
    calls = []
    method.teacher.denoiser.net.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(method, "student", data())
    assert not calls
    assert method.target.denoiser is not method.student
    with torch.no_grad():
        method.student.net.mean += 1.0
    method.after_step(Turn("student", 0))
    assert float(method.target.denoiser.net.mean.detach()) == pytest.approx(MU + 0.01, abs=1e-5)
    x, t, s = jumps()
    v, now = velocity(method, x, t), torch.zeros_like(x)
    before = method.wanted(x, v, t, s, NONE, now)
    with torch.no_grad():
        method.student.net.mean += 1.0
    assert torch.equal(before, method.wanted(x, v, t, s, NONE, now))


def test_phases_and_what_cannot_be():
    method = method_of(warm_start=2)
    assert [method.phase(step) for step in (1, 2)] == ["warm start", "twins"]
    loss, logs = loss_of(method, Turn("student", 1), data())
    own = (method.part(data().draws) == 3).float().mean()
    torch.testing.assert_close(loss, method.regression(data()) + own * logs["twin"])
    with pytest.raises(UserError, match=r"options.parts are all 0"):
        method_of(parts=(0, 0, 0, 0))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_jumps_learn_is_a_number_also_where_the_student_itself_says_it(decay):
    method, batch = method_of(Perceptron(seed=3), parts=(0, 0, 1, 0), target_decay=decay), data()
    a, b = (batch.draws.uniform(name, method.least, method.last) for name in ("a", "b"))
    x, x0, t, s, _ = method.points(batch, a, b)
    now = method.student.flow_velocity(x, t, s, NONE)
    error = now - method.wanted(x, (x - x0) / per_sample(t, x), t, s, NONE, now).detach()
    weight, weights = torch.tan((1 - (t - s)) * math.pi / 2.5) + 1, list(method.student.net.parameters())
    wanted = torch.autograd.grad((weight * robust(error)).mean(), weights)
    loss, logs = loss_of(method, "student", batch)
    for one, other in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert float(logs["residual"]) == pytest.approx(float(error.detach().square().mean().sqrt()))


def test_a_one_step_jump_moves_against_the_field_at_its_own_sample_noised_anew():
    """Its loss at t = 1, s = 0 beside that without the field, whose value and gradient are those of |F - sg[F - f]|."""
    plain, method = (
        method_of(Perceptron(seed=3), parts=(1, 0, 0, 0), rectify=weight, velocity="teacher")
        for weight in (0.0, 0.5)
    )
    batch, weights = data(), list(method.student.net.parameters())
    x, one = batch.draws.normal("eps", SHAPE), torch.ones(64)
    now = method.student.flow_velocity(x, one, torch.zeros(64), NONE)
    x_r, _, r = method.noised_anew(batch, "renoise", (x - now).detach(), torch.arange(64))
    field = method.field(x_r, r, NONE)
    assert not field.requires_grad and float(field.std()) > 0.01
    own = 0.5 * robust(now - (now - field).detach()).mean()
    (whole, logs), (without, _) = (loss_of(each, "student", batch) for each in (method, plain))
    torch.testing.assert_close(whole - without, own)
    torch.testing.assert_close(logs["field"], field.abs().mean())
    found = torch.autograd.grad(whole, weights, retain_graph=True)
    rest = torch.autograd.grad(without, list(plain.student.net.parameters()))
    for each, left, added in zip(found, rest, torch.autograd.grad(own, weights), strict=True):
        torch.testing.assert_close(each, left + added, rtol=1e-4, atol=1e-6)


def test_what_the_twin_learns_is_a_number():
    method, batch = method_of(Perceptron(seed=3), parts=(0, 0, 0, 1)), data()
    weights, one = list(method.student.net.parameters()), torch.ones(64)
    x0 = (batch.noise - method.student.flow_velocity(batch.noise, one, 0 * one, NONE)).detach()
    x_r, eps, r = method.noised_anew(batch, "twin", x0, torch.arange(64))
    wanted = robust(twin_prediction(method.student, x_r, r, NONE).velocity - (eps - x0)).mean()
    found = torch.autograd.grad(loss_of(method, "student", batch)[0], weights)
    for one, other in zip(found, torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(one, other)
