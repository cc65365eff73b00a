"""Decoupled MeanFlow on the Gaussian's exact map: the zeros of both halves, and what its loss is."""

from __future__ import annotations

import math

import pytest
import torch
from flow_toy import MU, C, errors, from_the_teacher

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.path import FlowPath
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.losses.flow_maps import logit_normal
from stepdistill.methods.dmf import DMF
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, GaussianFlowMap, ToyTeacher, loss_of, toy_batch, toy_student

PATH, NULL = FlowPath(), 0.2


def dmf(mean=MU, **options):
    """From the exact Gaussian teacher, without a prompt of another mean, to the exact map of a Gaussian."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, NULL, C))
    student = toy_student(GaussianFlowMap(mean, C), PATH, "velocity")
    chosen = {"guidance": 1.0, "derivative": "exact", **options}
    return DMF(Copies(teacher, student), (1.0,), DMF.Options(**chosen))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def test_the_exact_map_is_a_zero_of_both_halves_and_no_other_is():
    for mean, (low, high) in ((MU, (0, 1e-4)), (MU + 0.3, (0.05, 10))):
        logs = loss_of(dmf(mean), "student", data())[1]
        assert low <= float(logs["residual"]) < high and low <= float(logs["velocity"]) < high
    assert float(loss_of(dmf(), "student", data())[0].detach()) == pytest.approx(math.log(0.01), abs=1e-3)


@pytest.mark.parametrize("shift", [0.3, -0.3])
@pytest.mark.parametrize("half", ["still", "jump"])
def test_descent_on_either_half_takes_a_shift_of_the_map_back(shift, half):
    method = dmf(MU + shift)
    own, calls = method.distance, []
    method.distance = lambda error, t, s: (
        own(error, t, s) * float(bool((t == s).all()) == (half == "still") and not calls.append(half))
    )
    loss_of(method, "student", data(256))[0].backward()
    assert len(calls) == 1 and float(method.student.net.mean.grad) * shift > 1e-3


def test_the_loss_is_the_mean_of_a_velocitys_and_a_jumps():
    """log of the mean square and c, half of it of v at times r, half of MeanFlow's identity at t and s."""
    method, batch, none = dmf(MU + 0.3), data(), Condition()
    draws, u = batch.draws, method.student.flow_velocity
    r, a, b = (logit_normal(draws, n, m, 1.0) for n, m in (("r", 0.0), ("a", 0.4), ("b", -1.2)))
    x, x0, t, s, _ = method.points(batch, a, b)
    r = r.clamp(method.least, 1.0)
    x_r = STRAIGHT.noised(x0, draws.normal("r eps", (2, 1, 1)), r)
    still = u(x_r, r, r, none) - method.velocity(x_r, r, none)
    v = method.velocity(x, t, none)
    rate = torch.func.jvp(lambda x, t: u(x, t, s, none), (x, t), (v, torch.ones_like(t)))[1]
    jump = u(x, t, s, none) - v + (t - s).view(-1, 1, 1, 1) * rate
    sizes = [error.flatten(1).square().mean(1) for error in (still, jump)]
    wanted = sum((size + 0.01).log().mean() for size in sizes) / 2
    torch.testing.assert_close(loss_of(method, "student", batch)[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_learnt_variance_lowers_c_and_its_gradient_never_changes_sign():
    """log(m e^-w + c) + w = log(m + c e^w), whose slope in w is the share of c e^w in it: in (0, 1]."""
    method = dmf()
    t = torch.rand(32)
    for size, slope in ((0.0, 1.0), (0.01, 0.5), (0.99, 0.01)):
        error = torch.full((32, 2, 1, 1), math.sqrt(size))
        method.zero_grad()
        method.distance(error, t, 0.5 * t).backward()
        assert float(method.log_variance.last.bias.grad) == pytest.approx(slope, rel=1e-3)
    with torch.no_grad():
        method.log_variance.last.weight.normal_()
    one, other = method.log_variance(t, t), method.log_variance(t, 0.5 * t)
    assert float((one - other).abs().max()) > 0.1 and float(one.std()) > 0.1


def test_it_is_trained_beside_the_student():
    trained = dmf().trained()
    assert list(trained) == ["student"] and len(list(trained["student"].extra.parameters())) == 2


def test_the_guided_map_is_learnt_and_pairs_come_first():
    guided = dmf(mean=NULL + 3 * (MU - NULL), guidance=3.0)
    logs = loss_of(guided, "student", data())[1]
    assert float(logs["residual"]) < 1e-4 and float(logs["velocity"]) < 1e-4
    warm = dmf(warm_start=10)
    assert not loss_of(warm, Turn("student", 9), data())[1] and loss_of(warm, Turn("student", 10), data())[1]


def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end():
    options = DMF.Options(
        guidance=1.0,
        adaptive=False,
        offset=1.0,
        source="images",
        derivative="difference",
        derivative_step=0.1,
    )
    start, end = errors(from_the_teacher(DMF, options), steps=400)
    assert end < 0.5 * start, (start, end)


def test_a_distance_is_of_all_values_of_a_picture():
    error, t = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    wanted = torch.log(error.square().mean((1, 2, 3)) + 0.01).mean()
    torch.testing.assert_close(dmf(adaptive=False).distance(error, t, t), wanted)


def test_velocities_are_learnt_within_the_times_that_there_are():
    """Also where a logit-normal time is 0 or 1 to the last bit."""
    method, asked = dmf(time_deviation=100.0), []
    own = method.student.flow_velocity
    method.student.flow_velocity = lambda x, t, s, cond: asked.append(t) or own(x, t, s, cond)
    loss = loss_of(method, "student", data())[0]
    assert bool(torch.isfinite(loss)) and method.least > 0
    assert all(bool(((t >= method.least) & (t <= method.last)).all()) for t in asked) and asked
