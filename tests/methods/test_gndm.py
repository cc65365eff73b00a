"""GNDM against DMD and against closed forms on Gaussians, and what its rewards add."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.groups import mean_of_group
from stepdistill.losses.rewards import Rewards
from stepdistill.methods.dmd import DMD
from stepdistill.methods.gndm import GNDM, rms
from stepdistill.networks.roles import Copies
from stepdistill.testing.contract import build
from stepdistill.testing.toys import SHAPE, Affine, Gaussian, ToyTeacher, toy_batch, toy_student

PATH, MU, S = FlowPath(), 0.7, 0.8


def between(kind, shift, scale, **options):
    """A Gaussian teacher, an affine student, and a fake network that is exact for it."""
    teacher = ToyTeacher(Gaussian(PATH, MU, S), PATH)
    options = kind.Options(guidance=1.0, **options)
    method = kind(Copies(teacher, toy_student(Affine(shift, scale), PATH)), (1.0,), options)
    method.fake.net = Gaussian(PATH, shift, scale)
    return method


def grouped(group, count=8, step=0):
    return replace(toy_batch(count, step), group=group)


def test_a_group_of_one_is_dmd_to_the_last_bit():
    dmd, gndm = (between(kind, MU + 0.3, S) for kind in (DMD, GNDM))
    batch = toy_batch(8)
    x = dmd.generate(batch)
    assert torch.equal(gndm.match(x, batch)[0], dmd.match(x, batch)[0])
    assert torch.equal(gndm.field(x, batch), dmd.field(x, batch))


def test_a_group_shares_its_noise_and_its_normaliser_and_keeps_a_shift_of_the_mean():
    """With equal deviations the error is (m - mu) sigma^2 / V at every x_t: one number for a group that shares t, and
    so is the field. Centred, nothing would be left of it."""
    method, batch = between(GNDM, MU + 0.3, S), grouped(4)
    x = method.generate(batch).detach()
    views, field = method.views(x, batch), method.field(x, batch)
    t = batch.draws.of_groups(4).uniform("score t", *method.options.score_times)
    assert torch.equal(views.t, t.repeat_interleave(4)) and len(set(views.t.tolist())) == 2
    eps = (views.x_t - (1 - views.t).view(-1, 1, 1, 1) * x) / views.t.view(-1, 1, 1, 1)
    torch.testing.assert_close(eps, eps[::4].repeat_interleave(4, 0), rtol=1e-3, atol=1e-4)
    sigma, variance = t, (1 - t) ** 2 * S**2 + t**2
    size = (x - views.real.x0).abs().flatten(1).mean(1).view(2, 4).mean(1)
    expected = (0.3 * sigma**2 / variance / size).repeat_interleave(4)
    torch.testing.assert_close(field.flatten(1), expected[:, None].expand(-1, 2), rtol=1e-3, atol=1e-5)
    assert bool((field > 0).all())
    with torch.no_grad():
        x = MU - 0.3 + S * batch.noise
        method.fake.net = Gaussian(PATH, MU - 0.3, S)
        field, logs = method.field(x, batch), method.match(x, batch)[1]
    assert bool((field < 0).all()) and float(logs["field"]) == pytest.approx(float(field.abs().mean()))


def test_the_normaliser_does_not_move_the_fixed_point():
    """At the teacher's own law the field is zero at every sample, in groups of any size."""
    method = between(GNDM, MU, S)
    for group in (1, 2, 8):
        batch = grouped(group)
        assert float(method.field(method.generate(batch).detach(), batch).abs().max()) < 1e-5


@pytest.mark.parametrize("network", ["student", "fake"])
def test_a_grouped_batch_is_the_mean_of_its_halves(network):
    method, batch = build("gndm"), grouped(2)
    turn = next(turn for step in range(9) if (turn := method.turn(step)).network == network)
    parameters = method.roles.parameters(network)
    whole, *halves = (
        torch.autograd.grad(method.loss(turn, part).value, parameters) for part in (batch, *batch.split(2))
    )
    for all_of_it, one, two in zip(whole, *halves, strict=True):
        torch.testing.assert_close(all_of_it, (one + two) / 2, rtol=1e-4, atol=1e-6)


def test_a_reward_pulls_as_hard_as_the_field_times_its_weight_along_its_gradient():
    """Two rewards of any scale count alike; a constant added to one changes nothing."""
    goal = torch.tensor([2.0, -1.0])[:, None, None]

    def near(x, prompt):
        return -(x - goal).flatten(1).square().sum(1)

    def first(x, prompt):
        return 1e3 * x[:, 0, 0, 0] + 7.0 * prompt

    plain, batch = between(GNDM, MU + 0.3, S), grouped(4)
    x = plain.generate(batch)
    field = plain.field(x.detach(), batch)
    (own,) = torch.autograd.grad(plain.match(x, batch)[0], x, retain_graph=True)
    method = between(GNDM, MU + 0.3, S, climb_weight=0.5)
    method.rewards = Rewards(lambda x0: x0, (near, first))
    (found,) = torch.autograd.grad(method.match(x, batch)[0], x, retain_graph=True)
    added = (own - found) * x.numel()
    towards = (goal - x).detach()
    across = torch.zeros(8, *SHAPE)
    across[:, 0] = 1.0
    wanted = 0.5 * rms(field) * (towards / rms(towards) + across / rms(across))
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
    assert method.options.needs == plain.options.needs | {"reward"}


def test_means_of_groups():
    values = torch.arange(6.0).view(6, 1, 1, 1)
    assert mean_of_group(values, 3).flatten().tolist() == [1, 1, 1, 4, 4, 4]
    assert torch.equal(mean_of_group(values, 1), values)
