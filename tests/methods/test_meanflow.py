"""MeanFlow against the Gaussian's exact mean velocity, on its own path and on another, and learning it."""

from __future__ import annotations

import pytest
import torch
from consistency_toy import table_path
from flow_toy import MU, C, OnPath, errors, from_the_teacher

from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.families.condition import Condition
from stepdistill.losses.flow_maps import teacher_velocity
from stepdistill.methods.meanflow import MeanFlow
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    Gaussian,
    GaussianFlowMap,
    ToyTeacher,
    clear,
    loss_of,
    toy_batch,
    toy_student,
)


def meanflow(path=None, net=None, **options):
    """MeanFlow from the exact Gaussian teacher to a student that is its exact map."""
    path = path or FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, C), path)
    output = "velocity" if isinstance(path, FlowPath) else "x0"
    net = net or (GaussianFlowMap(MU, C) if output == "velocity" else OnPath(path))
    chosen = {"tangent_warmup": 0, **options}
    return MeanFlow(Copies(teacher, toy_student(net, path, output)), (1.0,), MeanFlow.Options(**chosen))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


@pytest.mark.parametrize("way", ["exact", "difference"])
@pytest.mark.parametrize("path", [FlowPath(), TrigPath(), table_path()], ids=["flow", "trig", "table"])
def test_loss_and_gradient_vanish_at_the_exact_map_and_not_beside_it(path, way):
    """u + (t - s) Du/Dt = v pointwise, whatever path the networks live on (card 6.1; G1, G3)."""
    method = meanflow(path, derivative=way, power=0.0, noise_share=0.2)
    rough = 1e-3 if way == "difference" else 2e-5
    loss, logs = loss_of(method, "student", data())
    loss.backward()
    mean, deviation = method.student.net.mean, method.student.net.deviation
    assert float(logs["residual"]) < rough
    assert max(abs(float(mean.grad)), abs(float(deviation.grad))) < 20 * rough
    with torch.no_grad():
        mean += 0.1
    clear(method)
    loss_of(method, "student", data())[0].backward()
    assert float(mean.grad) > 1e-2  # descent takes the shift back


def test_the_residual_is_the_errors_root_mean_square():
    """At power 0 the loss is the mean of |error|^2 over samples of two elements."""
    method = meanflow(power=0.0)
    with torch.no_grad():
        method.student.net.mean += 0.3
    loss, logs = loss_of(method, "student", data())
    assert loss.item() == pytest.approx(2 * float(logs["residual"]) ** 2, rel=1e-5)
    assert not any(value.requires_grad for value in logs.values())


def test_without_the_derivative_it_is_velocity_matching():
    """At the first step of a warm-up, and where s = t, the target is v itself."""
    for options in ({"tangent_warmup": 10}, {"same": 1.0}):
        method = meanflow(power=0.0, **options)
        batch = data()
        with torch.no_grad():
            method.student.net.mean += 0.3
        a, b = (torch.sigmoid(-0.4 + batch.draws.normal(name, ())) for name in ("a", "b"))
        x_t, _, t, s, _ = method.points(batch, a, b)
        v = teacher_velocity(method.teacher, x_t, t, Condition(), 1.0)
        wanted = (method.student.flow_velocity(x_t, t, s, Condition()) - v).flatten(1).square().sum(1).mean()
        torch.testing.assert_close(loss_of(method, "student", batch)[0], wanted, rtol=1e-4, atol=1e-6)


def test_a_tangent_other_than_the_targets_velocity_is_wrong():
    """With v + 1 in the tangent alone the exact map is no longer a zero: the identity ties the two together."""
    method = meanflow(power=0.0, same=0.0)
    exact = method.derivative.exact
    method.derivative.exact = lambda u, p, w: exact(u, p, (w[0] + 1, *w[1:]))
    assert float(loss_of(method, "student", data())[1]["residual"]) > 0.05


def test_the_guided_map_is_learnt():
    """Two Gaussians of one deviation: guidance g makes the mean g m - (g - 1) m0, and its exact map is the zero."""
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, C), path, unguided=Gaussian(path, 0.2, C))
    net = GaussianFlowMap(3 * MU - 2 * 0.2, C)
    method = MeanFlow(
        Copies(teacher, toy_student(net, path, "velocity")),
        (1.0,),
        MeanFlow.Options(guidance=3.0, tangent_warmup=0, power=0.0),
    )
    assert float(loss_of(method, "student", data())[1]["residual"]) < 1e-4


def test_jumps_go_towards_data_in_the_shares_that_were_asked():
    method = meanflow(same=0.5, to_data=0.25, noise_share=0.25)
    batch = data(2048)
    a, b = (batch.draws.uniform(name) for name in ("a", "b"))
    t, s = method.points(batch, a, b)[2:4]
    assert bool((t >= s).all()) and float(s.min()) >= 0 and float(t.max()) == 1
    assert float((s == t).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float((s == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    assert float((t == 1).float().mean()) == pytest.approx(0.25, abs=0.04)


def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end():
    """One step of teacher weights gives the mean; training moves it to mu + c z."""
    options = MeanFlow.Options(
        guidance=1.0, tangent_warmup=0, source="images", derivative="difference", derivative_step=0.1
    )
    start, end = errors(from_the_teacher(MeanFlow, options), steps=600)
    assert end < 0.5 * start, (start, end)
