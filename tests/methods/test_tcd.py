"""TCD against closed forms: the any-to-any map, its floor, its ends, and its sampler."""

from __future__ import annotations

import pytest
import torch
from consistency_toy import error, mixture_method, table_path, train

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import stock_scheduler
from stepdistill.families.condition import Condition
from stepdistill.losses.consistency import jump
from stepdistill.methods.tcd import TCD
from stepdistill.methods.tscd import TSCD
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.4
PATHS = [FlowPath(), TrigPath(), table_path()]
NAMES = ["flow", "trig", "table"]


def tcd(path, student, unguided=None, deviation=S, **options):
    teacher = ToyTeacher(Gaussian(path, MU, deviation), path, unguided=unguided)
    return TCD(
        Copies(teacher, toy_student(student, path)), (1.0,), TCD.Options(**{"guidance": 1.0, **options})
    )


def noise(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_jump_of_no_length_is_the_identity(path):
    """f(x_t, t, t) = x_t for any network, exactly, and nothing of it reaches the weights."""
    student = toy_student(Perceptron(), path, "velocity")
    x, t = noise(8), torch.linspace(0.1, 1, 8)
    out = jump(student, x, t, t, Condition())
    assert torch.equal(out, x)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.net.parameters())


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_jump_of_the_teacher_is_its_ddim_step(path):
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    x, t, s = noise(8), torch.full((8,), 0.8), torch.full((8,), 0.3)
    step = teacher.predict(x, t, Condition()).at(s)
    torch.testing.assert_close(jump(teacher.denoiser, x, t, s, Condition()), step)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_loss_is_zero_where_trajectories_are_straight(path):
    """A point mass: x0 and eps stay put on a trajectory, so one pair of them is right for every end."""
    method = tcd(path, Gaussian(path, MU, 0.0), deviation=0.0)
    batch = toy_batch(256, pairs=lambda z: torch.full_like(z, MU))
    assert float(loss_of(method, "student", batch)[1]["residual"]) < 2e-6


def test_the_floor_of_a_first_order_map():
    """On Stable Diffusion's table with data of deviation 0.8 the map that is exact for the clean end misses the state
    at timestep 499, whose deviation is 0.95, by 0.28 (card 3.2)."""
    path, deviation = table_path(), 0.8
    student = toy_student(GaussianMap(path, 0.0, deviation), path)
    t, e = torch.ones(40_000), torch.full((40_000,), 0.5)
    (alpha, sigma), (alpha_e, sigma_e) = path.alpha_sigma(t), path.alpha_sigma(e)
    variance, variance_e = (
        (a * deviation).square() + b.square() for a, b in ((alpha, sigma), (alpha_e, sigma_e))
    )
    x = per_sample(variance.sqrt(), noise(1)) * noise(40_000)
    exact = per_sample((variance_e / variance).sqrt(), x) * x
    missed = (jump(student, x, t, e, Condition()) - exact).square().mean().sqrt()
    assert float(exact.std()) == pytest.approx(0.95, abs=0.01)
    assert float(missed) == pytest.approx(0.28, abs=0.01)


def test_ends_lie_on_the_grid_between_the_boundary_and_the_teachers_point(monkeypatch):
    """All ends e <= s < t, the lowest at timestep 0 (card, checklist 11), each index as likely as its neighbours."""
    import stepdistill.methods.tcd as module

    path, seen = table_path(), []
    monkeypatch.setattr(
        module, "jump", lambda net, z, t, s, cond: (seen.append((t, s)), jump(net, z, t, s, cond))[1]
    )
    method = tcd(path, Gaussian(path, MU, S), grid=50)
    loss_of(method, "student", toy_batch(4000, pairs=lambda z: MU + S * z))
    (s, e), (t, same) = seen
    assert torch.equal(e, same)
    assert bool((e <= s).all()) and bool((s < t).all())
    assert float(e.min()) == pytest.approx(1 / 1000)
    low = e == e.min()
    torch.testing.assert_close((e * 50)[~low], (e * 50)[~low].round(), atol=1e-4, rtol=0)
    top = e[t == 1] * 50  # uniform on 0 .. 49 where t is the last
    assert float(top.mean()) == pytest.approx(24.5, abs=4 * 14.4 / len(top) ** 0.5)


@pytest.mark.parametrize("kind", [TCD, TSCD])
def test_every_end_from_the_boundary_to_the_teachers_point_is_drawn(kind, monkeypatch):
    """On a grid of 5, from time n / 5 with a step of one: the ends 0 .. n - 1, each as often, and no other."""
    import sys

    path, seen = FlowPath(), []
    monkeypatch.setattr(
        sys.modules[kind.__module__],
        "jump",
        lambda net, z, t, s, cond: (seen.append((t, s)), jump(net, z, t, s, cond))[1],
    )
    more = {"segments": (1,)} if kind is TSCD else {}
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = kind(
        Copies(teacher, toy_student(Gaussian(path, MU, S), path)), (1.0,), kind.Options(grid=5, **more)
    )
    loss_of(method, "student", toy_batch(2000, pairs=lambda z: MU + S * z))
    (s, _), (t, e) = seen
    torch.testing.assert_close(s, t - 0.2)
    for n in range(1, 6):
        drawn = torch.bincount((5 * e[(5 * t).round() == n]).round().long())  # about 400 in all
        assert len(drawn) == n
        assert float((drawn / drawn.sum() - 1 / n).abs().max()) < 4 * (1 / n / drawn.sum()) ** 0.5


def test_guidance_is_folded_into_the_ode():
    """With equal deviations the guided teacher is the Gaussian of mean u + g (c - u): the two losses are one."""
    path = TrigPath()
    guided = tcd(path, Perceptron(), unguided=Gaussian(path, 0.2, S), guidance=2.5)
    plain = tcd(path, Perceptron())
    plain.teacher.denoiser.net.mean.fill_(0.2 + 2.5 * (MU - 0.2))
    ranged = tcd(path, Perceptron(), unguided=Gaussian(path, 0.2, S), guidance_range=(2.5, 2.5))
    batch = toy_batch(64, pairs=lambda z: MU + S * z)
    expected = loss_of(plain, "student", batch)[0]
    torch.testing.assert_close(loss_of(guided, "student", batch)[0], expected)
    torch.testing.assert_close(loss_of(ranged, "student", batch)[0], expected)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_noise_between_steps_keeps_the_variance(gamma):
    """Where jumps are exact (a point mass of data: x0 = mu) every state has mean alpha mu and variance sigma^2, for
    every gamma (card, test G12)."""
    path, count = table_path(), 100_000
    student = toy_student(Gaussian(path, MU, 0.0).requires_grad_(False), path)
    sampler = Sampler(uniform_times(4), True, 50, gamma=gamma)
    t = torch.ones(1)
    alpha, sigma = path.alpha_sigma(t)
    start = float(alpha) * MU + float(sigma) * noise(count)
    for calls in (1, 2, 3):
        x = sampler.walk(student, start, Condition(), lambda call: noise(count, 1 + call), calls).detach()
        alpha, sigma = (float(value) for value in path.alpha_sigma(torch.tensor([1 - calls / 4])))
        assert float(x.mean()) == pytest.approx(alpha * MU, abs=4 * sigma / (2 * count) ** 0.5)
        assert float(x.var()) == pytest.approx(sigma**2, rel=4 * count**-0.5)


def test_the_sampler_of_the_method():
    """Any gamma on a table; on a flow path none, as no stock scheduler re-noises there from a seed."""
    table = tcd(table_path(), Perceptron(), gamma=0.3).sampler()
    assert (table.gamma, table.renoise, table.step_counts) == (0.3, True, (1, 2, 4, 8))
    flow = tcd(FlowPath(), Perceptron()).sampler()
    assert (flow.gamma, flow.renoise) == (None, False)
    with pytest.raises(UserError):
        stock_scheduler(tcd(FlowPath(), Perceptron(), gamma=0.3).sampler(), FlowPath(), None)


@pytest.mark.slow
def test_training_brings_one_and_four_steps_to_the_end_of_the_ode():
    method = mixture_method(
        TCD, source="images", guidance=1.0, noise_share=0.2, grid=16, target_decay=0.5, huber=0.03
    )
    before = {steps: error(method, steps) for steps in (1, 4)}
    train(method, 500, lr=5e-3, batch=48)
    after = {steps: error(method, steps) for steps in (1, 4)}
    print(f"before {before}, after {after}")
    assert after[1] < 0.5 * before[1]
    assert after[4] < 0.8 * before[4]  # where a first-order map has its floor
