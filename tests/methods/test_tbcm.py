"""TBCM against closed forms: its random routes, trajectories on the ODE's invariant, the order of its residual."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from consistency_toy import error, mixture_method, table_path, train

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.losses.consistency import last_time
from stepdistill.methods.tbcm import TBCM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
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


def tbcm(path, student, unguided=None, deviation=S, **options):
    teacher = ToyTeacher(Gaussian(path, MU, deviation), path, unguided=unguided)
    return TBCM(
        Copies(teacher, toy_student(student, path)), (1.0,), TBCM.Options(**{"guidance": 1.0, **options})
    )


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_routes_descend_strictly_through_the_reference_intervals(path):
    """Every time but the ends is random inside its own interval of the reference route (card: stochastic t)."""
    method = tbcm(path, Perceptron())
    times = method.route(toy_batch(500))
    assert times.shape == (500, 17)
    assert bool((times[:, 0] == 1).all())
    assert float(times[0, -1]) == pytest.approx(last_time(path))
    assert bool(
        (times.diff(dim=1) < 0).all()
    )  # also on a table, which ends before pure noise on the flow path
    for earlier, later in pairwise(times[:, 1:-1].unbind(1)):
        assert float(later.max()) <= float(earlier.min())
        assert float(later.std()) > 0


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_one_time_of_the_route_lies_in_each_interval_of_the_shifted_flow_schedule(shift):
    """The first between pure noise and the reference's next time, the last above clean data; uniform in the angle
    atan(t / (1 - t)). So the teacher's first step is at most one interval long, and no noise level is left out."""
    times = tbcm(FlowPath(), Perceptron(), route_shift=shift).route(toy_batch(4000))
    u = torch.linspace(1, 0, 16)
    edges = torch.atan2(shift * u, 1 - u)
    angles = torch.atan2(times, 1 - times)[:, 1:-1]
    place = (angles - edges[1:]) / (edges[:-1] - edges[1:])  # in its interval, 0 at the lower end
    assert float(place.min()) > -1e-4 and float(place.max()) < 1 + 1e-4
    torch.testing.assert_close(place.mean(0), torch.full((15,), 0.5), atol=0.02, rtol=0)
    torch.testing.assert_close(place.std(0), torch.full((15,), 12**-0.5), atol=0.01, rtol=0)
    assert float(times[:, 1].max()) > 0.999


@pytest.mark.parametrize("path", PATHS[:2], ids=NAMES[:2])
def test_states_keep_the_invariant_of_the_ode(path):
    """(x - alpha mu) / sqrt(V) is constant on a trajectory; DDIM's error of it halves with twice the steps (card)."""
    drifts = []
    for route in (16, 32, 64):
        method = tbcm(path, Perceptron(), route=route)
        batch = toy_batch(200)
        times = method.route(batch)
        states = method.trajectory(batch.noise, times, batch.cond).flatten(0, 1)
        alpha, sigma = (per_sample(value, states) for value in path.alpha_sigma(times.flatten()))
        invariant = (states - alpha * MU) / ((alpha * S).square() + sigma.square()).sqrt()
        invariant = invariant.view(200, -1, 2)
        drifts.append(float((invariant - invariant[:, :1]).square().mean().sqrt()))
    for coarse, fine in pairwise(drifts):
        assert 1.6 < coarse / fine < 2.6


@pytest.mark.parametrize("path", PATHS[:2], ids=NAMES[:2])
def test_squared_residual_at_the_exact_map_falls_with_the_fourth_power_of_the_step(path):
    """Neighbours on the teacher's trajectory are one DDIM step apart, O(h^2) off the exact map (card, tests G2, G3)."""
    squares = []
    for route in (16, 32, 64):
        method = tbcm(path, GaussianMap(path, MU, S), route=route, points=route)
        squares.append(float(loss_of(method, "student", toy_batch(300))[1]["residual"]) ** 2)
    for coarse, fine in pairwise(squares):
        assert 11 < coarse / fine < 22


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_loss_is_zero_where_the_solver_is_exact(path):
    """A point mass: each x0 of the teacher is the mass, and so is the consistency function."""
    method = tbcm(path, Gaussian(path, MU, 0.0), deviation=0.0)
    # On a table the last state is its timestep 0, where the map is the identity: the pair there is off by that noise.
    bound = 2e-6 if last_time(path) == 0 else 0.012
    assert float(loss_of(method, "student", toy_batch(64))[1]["residual"]) < bound


def test_it_learns_from_noise_and_conditions_alone():
    """No images and no pairs are asked for, and none are touched."""
    assert TBCM.Options().needs == {"noise", "prompts"}
    batch = replace(toy_batch(8), images=None, pairs=None)
    assert bool(torch.isfinite(loss_of(tbcm(FlowPath(), Perceptron()), "student", batch)[0]))


def test_a_few_points_estimate_the_loss_of_all():
    path = FlowPath()
    all_of_them, few = (tbcm(path, Gaussian(path, MU, S), points=points) for points in (16, 2))
    batch = toy_batch(4000)
    whole = float(loss_of(all_of_them, "student", batch)[0].detach())
    assert float(loss_of(few, "student", batch)[0].detach()) == pytest.approx(whole, rel=0.05)


def test_guidance_moves_the_trajectory():
    """With equal deviations the guided trajectory is that of the mean u + g (c - u)."""
    path = FlowPath()
    guided = tbcm(path, Perceptron(), unguided=Gaussian(path, 0.2, S), guidance=2.5)
    moved = TBCM(
        Copies(ToyTeacher(Gaussian(path, 0.2 + 2.5 * (MU - 0.2), S), path), toy_student(Perceptron(), path)),
        (1.0,),
        TBCM.Options(guidance=1.0),
    )
    batch = toy_batch(16)
    torch.testing.assert_close(loss_of(guided, "student", batch)[0], loss_of(moved, "student", batch)[0])


@pytest.mark.slow
def test_training_brings_one_step_to_the_end_of_the_ode():
    method = mixture_method(TBCM, guidance=1.0, points=8, route=8, huber=0.03)
    before = error(method, 1)
    after = error(train(method, 300, lr=4e-3, batch=48), 1)
    print(f"one step: {before:.3f} -> {after:.3f}")
    assert after < 0.5 * before
