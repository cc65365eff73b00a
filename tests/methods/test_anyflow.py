"""AnyFlow on the Gaussian's exact map: the drawing's three jumps, the map's zero, and the field that brings it home."""

from __future__ import annotations

import pytest
import torch
from flow_toy import MU, C

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import denoising_loss
from stepdistill.methods.anyflow import AnyFlow
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    Gaussian,
    GaussianFlowMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

PATH, NULL = FlowPath(), 0.2
CHOSEN = {"guidance": 1.0, "tangent_warmup": 0, "derivative": "exact", "map_updates": 0}


def method_of(net=None, **options):
    """From the exact Gaussian teacher, without a prompt of another mean, to the exact map of a Gaussian."""
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, NULL, C))
    student = toy_student(net or GaussianFlowMap(MU, C), PATH, "velocity")
    return AnyFlow(Copies(teacher, student), (1.0,), AnyFlow.Options(**{**CHOSEN, **options}))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


@pytest.mark.parametrize("count", [1, 2, 4, 50])
def test_three_jumps_of_the_exact_map_end_where_its_trajectory_does(count):
    """Whatever the step in the middle: m + c z (the semigroup); jumps of no length are not made."""
    method, made = method_of(counts=(count,)), set()
    for step in range(12):
        calls = []
        handle = method.student.net.register_forward_pre_hook(
            lambda net, given, to=calls: to.append(given[2]["gap"])
        )
        batch = data(16, step)
        torch.testing.assert_close(method.rollout(batch), MU + C * batch.noise, rtol=1e-4, atol=1e-4)
        handle.remove()
        made.add(len(calls))
        assert float(torch.stack(calls).sum(0)[0]) == pytest.approx(1.0, abs=1e-5)
        assert any(float(gap[0]) == pytest.approx(1 / count, abs=1e-5) for gap in calls)
    assert made <= {1: {1}, 2: {2}}.get(count, {2, 3}) and made


def test_the_gradient_runs_through_all_three_jumps():
    """It is that of the composition: u's change at any of the three moves the end."""
    method, batch = method_of(Perceptron(seed=3), counts=(4,)), data(16, 3)
    seen = []
    handle = method.student.net.register_forward_hook(lambda net, given, said: seen.append(said))
    end = method.rollout(batch).sum()
    handle.remove()
    assert len(seen) == 3
    assert all(float(grad.abs().min()) > 0 for grad in torch.autograd.grad(end, seen))


def test_the_exact_map_is_a_zero_of_the_map_and_the_guided_one_of_a_guided_teachers():
    for mean, guidance in ((MU, 1.0), (NULL + 3 * (MU - NULL), 3.0)):
        method = method_of(GaussianFlowMap(mean, C), guidance=guidance)
        assert float(method.of_map(data(), 0)[1].detach()) < 1e-4
    assert float(method_of(GaussianFlowMap(MU + 0.3, C)).of_map(data(), 0)[1].detach()) > 0.05


@pytest.mark.parametrize("shift", [0.4, -0.4])
def test_the_field_takes_a_shift_of_the_samples_back(shift):
    """With an exact fake score; and nothing is left where the samples are the teacher's."""
    method, batch = method_of(GaussianFlowMap(MU + shift, C), counts=(4,), map_weight=0.0), data(256)
    method.fake.net = Gaussian(PATH, MU + shift, C)
    loss_of(method, Turn("student", 0), batch)[0].backward()
    assert float(method.student.net.mean.grad) * shift > 0.01
    method.fake.net = Gaussian(PATH, MU, C)
    assert float(method.field(MU + C * batch.noise, batch).abs().max()) < 1e-3


def test_the_fields_length_is_over_the_distance_to_the_real_prediction():
    method, batch = method_of(), data()
    method.fake.net = Gaussian(PATH, 1.5, C)
    x = 1.5 + C * batch.noise
    r = batch.draws.uniform("score t", method.least, method.last)
    x_r = PATH.noised(x, batch.draws.normal("score eps", (2, 1, 1)), r)
    real, fake = method.teacher.predict(x_r, r, batch.cond).x0, method.fake.predict(x_r, r, batch.cond).x0
    wanted = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(method.field(x, batch), wanted, rtol=1e-3, atol=1e-4)


def test_the_fake_score_learns_what_the_map_draws():
    method, batch = method_of(counts=(2,)), data()
    loss, logs = loss_of(method, Turn("fake", 3), batch)
    wanted = denoising_loss(method.fake, MU + C * batch.noise, batch, "x0")
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-5)
    assert set(logs) == {"denoising"}


def test_stages_follow_one_another():
    method = method_of(
        warm_start=2, map_updates=3, fake_warm_start=1, map_lr_ratio=7.0, warm_start_lr_ratio=30
    )
    assert "".join(method.turn(step).network[0] for step in range(10)) == "sssss" + "f" + "fsfs"
    phases = [method.phase(step) for step in (0, 2, 4, 5, 6)]
    assert phases == ["warm start", "flow map", "flow map", "fake score alone", "matching"]
    rates = [method.lr_ratio(Turn("student", step)) for step in (0, 2, 4, 7)]
    assert rates == pytest.approx([30, 7, 7, 1])
    seen = [set(loss_of(method, Turn("student", step), data())[1]) for step in (1, 2, 7)]
    assert seen == [set(), {"residual"}, {"residual", "field"}]


def test_the_loss_is_the_matching_and_the_map():
    batch = data()
    parts = [
        loss_of(method_of(GaussianFlowMap(1.2, C), map_weight=w), Turn("student", 0), batch)[0]
        for w in (0, 1, 2)
    ]
    torch.testing.assert_close(parts[2] - parts[0], 2 * (parts[1] - parts[0]))
    alone = loss_of(
        method_of(GaussianFlowMap(1.2, C), map_weight=5.0, map_updates=1), Turn("student", 0), batch
    )[0]
    torch.testing.assert_close(alone, parts[1] - parts[0])


def test_the_field_is_divided_by_a_mean_over_all_values_of_a_picture():
    method, batch = method_of(score_guidance=1.0), data(8)
    method.fake.net = Gaussian(PATH, MU + 0.5, C)
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = method.field(x, batch)
    r = batch.draws.uniform("score t", method.least, method.last)
    x_r = PATH.noised(x, batch.draws.normal("score eps", (2, 3, 3)), r)
    real = method.teacher.predict(x_r, r, batch.cond).x0
    apart = method.fake.predict(x_r, r, batch.cond).x0 - real
    wanted = apart / (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
