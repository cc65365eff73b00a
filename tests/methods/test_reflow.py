"""Reflow against closed forms, and the cache of pairs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.path import FlowPath, TablePath, TrigPath, per_sample
from stepdistill.diffusion.solvers import solve
from stepdistill.families.condition import Condition
from stepdistill.methods.reflow import Reflow
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.testing.toys import SHAPE, Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

MU, S = 0.7, 0.4


class Straight(nn.Module):
    """The exact x0 of the reflowed Gaussian: on lines from z to mu + s z, z = (x - (1 - t) mu) / ((1 - t) s + t)."""

    def __init__(self, path):
        super().__init__()
        self.path, self.error = path, nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t, cond):
        alpha, sigma = self.path.alpha_sigma(t)
        time, norm = sigma / (alpha + sigma), alpha + sigma
        on_line, time = x / per_sample(norm, x), per_sample(time, x)
        return MU + S * (on_line - (1 - time) * MU) / ((1 - time) * S + time) + self.error


def table_path():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return TablePath.from_alphas_cumprod(torch.cumprod(1 - betas, 0))


def reflow(path, net, times=(1.0,), output="x0", **options):
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    return Reflow(Copies(teacher, toy_student(net, path, output)), times, Reflow.Options(**options))


def pair_batch(count=256, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()])
def test_reflow_loss_is_zero_at_the_straight_velocity(path):
    """Gaussian pairs (z, mu + s z) never cross: the regression target is a function, its loss zero (card 8.1, a)."""
    assert float(loss_of(reflow(path, Straight(path)), "student", pair_batch())[0]) < 1e-9


def test_reflow_loss_is_zero_on_a_discrete_table_up_to_its_end():
    """Read on the straight path a table's network sees the same angle; beyond its last entry it is clamped there."""
    path = table_path()
    method = reflow(path, Straight(path))
    batch = pair_batch()
    t = torch.linspace(0.05, 0.9, 256)  # the table ends at t = 0.936
    z, x = batch.pairs.noise, batch.pairs.x0
    velocity = method.student.predict_on(STRAIGHT, STRAIGHT.noised(x, z, t), t, Condition()).velocity
    torch.testing.assert_close(velocity, z - x, atol=2e-4, rtol=1e-4)


def test_one_euler_step_is_exact_after_reflow_and_not_before():
    path = FlowPath()
    z = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(0))
    straight, curved = toy_student(Straight(path), path), toy_student(Gaussian(path, MU, S), path)
    one = Sampler((1.0,), renoise=False)
    drawn = one.draw(straight, z, Condition(), lambda i: z)
    torch.testing.assert_close(drawn, MU + S * z, atol=1e-6, rtol=1e-5)
    assert float((one.draw(curved, z, Condition(), lambda i: z) - (MU + S * z)).square().mean().sqrt()) > 0.3


def test_straightness_is_zero_after_reflow():
    """S = integral of E|(z - x0) - v|^2 along the own trajectory is 0 for the reflowed velocity, not the teacher's."""
    path = FlowPath()
    values = {}
    for name, net in (("reflowed", Straight(path)), ("teacher", Gaussian(path, MU, S))):
        student, total = toy_student(net.requires_grad_(False), path), 0.0
        z = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(0))
        times = torch.linspace(1, 0, 65).tolist()
        end = solve(lambda x, t, s=student: s.predict(x, t, Condition()), z, times, "heun")
        x = z
        for t, s in pairwise(times):
            velocity = student.predict(x, torch.full((256,), t), Condition()).velocity
            total += (t - s) * float((z - end - velocity).square().mean())
            x = solve(lambda x, t, s=student: s.predict(x, t, Condition()), x, (t, s), "heun")
        values[name] = total
    assert values["reflowed"] < 1e-8
    assert values["teacher"] > 0.02


def test_training_finds_the_straight_velocity():
    """The offset of an otherwise exact network is regressed away, through the reading on a curved path."""
    path = TrigPath()
    net = Straight(path)
    method = reflow(path, net)
    with torch.no_grad():
        net.error.fill_(0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        loss_of(method, "student", pair_batch(32, step))[0].backward()
        optimizer.step()
    assert abs(float(net.error)) < 0.02


def test_distillation_is_zero_at_the_map_and_begins_after_the_first_stage():
    path = FlowPath()
    method = reflow(path, Straight(path), reflow_updates=2)
    assert [method.phase(step) for step in (1, 2)] == ["reflow", "distillation"]
    assert [method.lr_ratio(method.turn(step)) for step in range(4)] == pytest.approx([1, 0.5, 1, 1])
    assert "reflow" in loss_of(method, "student", pair_batch())[1]
    method.after_step(method.turn(0))
    assert "reflow" in loss_of(method, method.turn(1), pair_batch())[1]
    with torch.no_grad():
        method.student.net.error.fill_(0.3)
    method.after_step(method.turn(1))
    assert float(method.flow.net.error) == pytest.approx(0.3)  # fresh pairs are the reflowed student's
    with torch.no_grad():
        method.student.net.error.fill_(0.0)
    loss, logs = loss_of(method, method.turn(2), pair_batch())
    assert "distillation" in logs
    assert float(loss) < 1e-12
    with torch.no_grad():
        method.student.net.error.fill_(0.1)
    assert float(loss_of(method, method.turn(2), pair_batch())[0]) == pytest.approx(0.01, rel=1e-4)


def test_fresh_pairs_come_from_the_frozen_flow():
    """With fresh = 1 the target is the end of the reflowed student's own Euler trajectory from the batch's noise."""
    path = FlowPath()
    method = reflow(path, Straight(path), reflow_updates=0, fresh=1.0, flow_steps=3)
    with torch.no_grad():
        method.flow.net.error.fill_(0.2)
    batch = pair_batch(64)
    target = method.flow_sample(batch.noise, batch.cond)
    out = MU + S * batch.noise
    expected = float((out - target).square().mean())
    assert float(loss_of(method, "student", batch)[0]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_a_batch_is_its_two_halves():
    path = FlowPath()
    for options in ({"reflow_updates": 5}, {"reflow_updates": 0, "fresh": 0.5}):
        torch.manual_seed(0)
        method = reflow(path, Perceptron(), output="velocity", times=(1.0, 0.5), **options)
        whole = loss_of(method, "student", pair_batch(16))[0]
        halves = [loss_of(method, "student", part)[0] for part in pair_batch(16).split(2)]
        torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-6)
