"""rCM against closed forms: where it is sCM, what it fades in, its rollouts, and the field that stands beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from mixture_toy import Batched
from table_toy import TABLE

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import noised
from stepdistill.losses.continuous_time import trig_velocity
from stepdistill.losses.contract import Turn
from stepdistill.methods.dmd import DMD
from stepdistill.methods.rcm import RCM
from stepdistill.methods.scm import SCM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.4
PATHS = pytest.mark.parametrize("path", [FlowPath(), TrigPath(), TABLE], ids=["flow", "trig", "table"])


def method_of(kind=RCM, path=None, student=None, times=(1.0, 0.5), output="x0", fake=None, **options):
    path = path or FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    roles = Copies(teacher, toy_student(student or Perceptron(seed=1), path, output))
    chosen = {"guidance": 1.0, **({} if kind is DMD else {"tangent_warmup": 0}), **options}
    method = kind(roles, times, kind.Options(**chosen))
    if fake is not None:
        method.fake.net = fake
    return method


def data(count=32, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


def gradients(method, batch, turn="student"):
    found = loss_of(method, turn, batch)[0]
    return torch.autograd.grad(found, list(method.student.net.parameters()))


@PATHS
def test_without_the_score_it_is_scm_to_the_last_bit(path):
    """Card: lambda = 0 is sCD. The same turns, loss and gradient, and no further network."""
    rcm = method_of(path=path, score_weight=0.0)
    scm = method_of(SCM, path=path, adaptive=False)
    for step in (0, 3):
        assert rcm.turn(step) == scm.turn(step)
        assert torch.equal(*(loss_of(each, "student", data(step=step))[0] for each in (rcm, scm)))
        for one, other in zip(gradients(rcm, data(step=step)), gradients(scm, data(step=step)), strict=True):
            assert torch.equal(one, other)
    assert rcm.fake is None and rcm.roles.names == ("student",) and list(rcm.trained()) == ["student"]


@PATHS
def test_the_exact_map_and_its_own_score_are_a_fixed_point(path):
    """The student is the consistency function of a Gaussian, and the fake network the score of what it draws, which is
    the teacher's: no tangent and no field. Another student, or another score, has both."""
    there = method_of(
        path=path, student=GaussianMap(path, MU, S), fake=Gaussian(path, MU, S), derivative="exact"
    )
    step = next(s for s in range(20) if there.turn(s).network == "student")
    loss, logs = loss_of(there, "student", data(step=step))
    assert float(logs["tangent"]) < 1e-4 and float(logs["field"]) == 0 and float(loss.detach()) < 1e-6
    for gradient in gradients(there, data(step=step)):
        assert abs(float(gradient)) < 1e-4
    beside = method_of(path=path, student=GaussianMap(path, MU, S + 0.1), fake=Gaussian(path, MU + 0.2, S))
    _, logs = loss_of(beside, "student", data(step=step))
    assert float(logs["tangent"]) > 0.01 and float(logs["field"]) > 0.01


def test_the_rollouts_of_the_exact_map_have_the_teachers_law_whatever_their_times():
    """Fresh noise between calls keeps the marginals, and the consistency function takes each to the data."""
    method = method_of(student=GaussianMap(FlowPath(), MU, S), times=(1.0, 0.75, 0.5, 0.25))
    for step in range(12):
        batch = Batch(Batched(0, step, 0, 20_000), SHAPE, Condition(), torch.zeros(20_000))
        with torch.no_grad():
            x = method.generate(batch)
        assert float(x.mean()) == pytest.approx(MU, abs=0.01) and float(x.std()) == pytest.approx(S, abs=0.01)


@pytest.mark.parametrize("renoise", [True, False])
def test_a_rollout_makes_one_to_k_calls_at_descending_times_and_the_last_alone_has_a_graph(renoise):
    method, lengths = method_of(times=(1.0, 0.75, 0.5, 0.25), renoise=renoise), set()
    forward, seen = method.student.net.forward, []
    method.student.net.forward = lambda x, t, cond: seen.append((x, t)) or forward(x, t, cond)
    for step in range(40):
        seen.clear()
        batch = toy_batch(8, step)
        x = method.generate(batch)
        lengths.add(len(seen))
        assert x.requires_grad and not any(state.requires_grad for state, _ in seen)
        assert torch.equal(seen[0][0], batch.noise) and bool((seen[0][1] == 1).all())
        for (state, t), (after, s) in pairwise(seen):
            assert bool((s <= t).all()) and len(set(s.tolist())) > 1 and bool((s <= 0.98).all())
            with torch.no_grad():
                said = method.student.path.read(forward(state, t, Condition()), "x0", state, t)
                call = next(i for i, (one, _) in enumerate(seen) if one is state)
                fresh = method.student.path.noised(said.x0, batch.fresh(call), s)
            torch.testing.assert_close(after, fresh if renoise else said.at(s))
    assert lengths == {1, 2, 3, 4}


def test_the_score_term_is_dmds():
    """The gradient beside that of consistency alone is ``score_weight`` times DMD's at one step, whose rollout has one
    call: the same noise, times, normaliser and guidance."""
    weight, fake = 0.3, Perceptron(seed=5)
    both = method_of(times=(1.0,), score_weight=weight, fake=fake)
    alone = method_of(times=(1.0,), score_weight=0.0)
    dmd = method_of(DMD, times=(1.0,), fake=fake)
    batch = data(step=4)
    parts = [gradients(each, batch) for each in (both, alone, dmd)]
    for whole, consistency, score in zip(*parts, strict=True):
        torch.testing.assert_close(whole - consistency, weight * score, rtol=1e-3, atol=1e-6)
    sizes = [loss_of(each, "student", batch)[1]["field"] for each in (both, dmd)]
    torch.testing.assert_close(*sizes)
    one, other = (
        loss_of(each, "fake", batch)[0]
        for each in (both, method_of(DMD, times=(1.0,), fake=fake, fake_loss="output"))
    )
    assert torch.equal(one, other)


@PATHS
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_derivative_is_whole_from_the_start_and_the_rest_fades_in(path, share):
    """g = -cos sqrt(1 - r^2 sin^2) (F - v) - (r cos sin y + J), J not times r; at r = 1 sCM's (card 2.8)."""
    method, scm = (method_of(kind, path=path, derivative="exact") for kind in (RCM, SCM))
    batch, student = data(), method.student
    t = method.drawn_times(batch.draws)
    x_t = noised(path, batch.pairs.x0, batch.draws.normal("eps", SHAPE), t)
    now = method.teacher.predict(x_t, t, Condition())
    F = trig_velocity(student.predict(x_t, t, Condition())).detach()
    a = per_sample(path.angle(t), F)
    found = method.tangent(now, F, Condition(), share)
    y = torch.cos(a) * now.x0 + torch.sin(a) * now.eps
    J = torch.cos(a) * torch.sin(a) * method.slope(now, Condition())
    lead = torch.cos(a) * (1 - share**2 * torch.sin(a) ** 2).clamp_min(0).sqrt()
    torch.testing.assert_close(found, -lead * (F - trig_velocity(now)) - share * torch.cos(a) * torch.sin(a) * y - J,
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    assert torch.equal(found, scm.tangent(now, F, Condition(), share)) == (share == 1)


def test_the_warm_up_is_of_consistency_alone_and_the_fake_score_comes_first_after_it():
    method = method_of(tangent_warmup=3, fake_updates=4)
    assert "field" in method.loss(Turn("student", 3), data(step=3)).logs
    assert "".join(method.turn(s).network[0] for s in range(14)) == "sss" + "ffffs" * 2 + "f"
    assert "field" not in loss_of(method, "student", data(step=2))[1]
    assert "field" in loss_of(method, "student", data(step=7))[1]
    assert [method.phase(s) for s in (0, 2, 3)] == ["tangent fades in", "tangent fades in", "matching"]
    assert method.share(1) == pytest.approx(1 / 3) and method.share(30) == 1


def test_a_turn_reaches_its_own_network_alone():
    method = method_of(fake=Perceptron(seed=2))
    for turn, other in (("student", "fake"), ("fake", "student")):
        for net in modules_of(method).values():
            net.zero_grad()
        loss_of(method, turn, data(step=4))[0].backward()
        assert all(p.grad is not None for p in modules_of(method)[turn].parameters())
        assert all(p.grad is None for p in modules_of(method)[other].parameters())
