"""DisBack: waypoints are recorded on the way to the student's score and walked back to the teacher."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_teacher

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.losses.contract import Turn
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd import DMD
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.testing.toys import (
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

PATH = FlowPath()
MU, S = 2.0, 0.8


def method_of(kind=DisBack, net=None, **options):
    teacher = ToyTeacher(Perceptron(), PATH, "velocity")
    student = toy_student(net or Perceptron(seed=1), PATH, "velocity" if net is None else "x0")
    return kind(Copies(teacher, student), (1.0,), kind.Options(**options))


def moved(method, seed=5):
    """The same method, its fake network off the teacher."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in method.roles.parameters("fake"):
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return method


def test_with_one_waypoint_it_is_dmd_bit_for_bit():
    ours = moved(method_of(waypoints=1, fake_warm_start=4, fake_updates=2))
    theirs = moved(method_of(DMD, guidance=1.0, fake_warm_start=4, fake_updates=2))
    for step in range(12):
        turn, batch = ours.turn(step), toy_batch(8, step)
        assert turn == theirs.turn(step)
        assert torch.equal(loss_of(ours, turn, batch)[0], loss_of(theirs, turn, batch)[0])


def test_the_way_back_ends_at_the_teacher():
    """N = 3 networks of two updates each: psi_2, psi_1, then the teacher for good; a cycle is two turns."""
    method = method_of(waypoints=3, fake_warm_start=10, fake_updates=1, interval=2, warm_start=4)
    updates = [step for step in range(4, 40) if method.turn(step).network == "student"]
    assert updates[0] == 15
    assert [method.target_of(step) for step in updates] == [2, 2, 1, 1] + [0] * 9
    assert [method.turn(step).network for step in range(14)] == ["student"] * 4 + ["fake"] * 10
    short = method_of(waypoints=3, fake_warm_start=10, fake_updates=1, interval=1)
    assert [short.target_of(step) for step in (0, 11, 13, 15)] == [2, 2, 1, 0]
    assert not any(p.requires_grad for n in (1, 2) for p in method.roles.parameters(f"waypoint-{n}"))


def test_waypoints_are_what_the_fake_network_was_on_its_way():
    method = method_of(waypoints=4, fake_warm_start=16, warm_start=2)
    assert method.recorded_at == [1, 4, 9]
    passed = []
    for step in range(2, 18):
        with torch.no_grad():
            for value in method.roles.parameters("fake"):
                value += 1.0
        passed.append([value.clone() for value in method.roles.parameters("fake")])
        method.after_step(Turn("fake", step))
    for number, update in enumerate(method.recorded_at, 1):
        for one, other in zip(method.roles.parameters(f"waypoint-{number}"), passed[update - 1], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rank", [None, 2, 8])
def test_waypoints_of_adapters_take_the_rank_of_the_fake_network_that_they_record(rank):
    roles = Adapters(tiny_teacher("sd"), 4)
    options = DisBack.Options(fake_lora_rank=rank, fake_warm_start=4, waypoints=2)
    method = DisBack(roles, (1.0,), options)
    turns = [method.turn(step) for step in range(4)]
    assert {turn.network for turn in turns} == {"fake"} and method.recorded_at == [1]
    with torch.no_grad():
        for value in roles.parameters("fake"):
            value += 1.0
    for turn in turns:
        method.after_step(turn)
    fake, recorded = roles.weights("fake"), roles.weights("waypoint-1")
    assert all(torch.equal(recorded[name], value) for name, value in fake.items())
    ranks = {len(value) for name, value in fake.items() if name.endswith("lora_A.weight")}
    assert ranks == {rank or 4}


def test_towards_what_the_fake_network_is_there_is_no_field():
    """The student's first target, where it is the fake network itself, leaves it where it is: exactly."""
    method = moved(method_of(waypoints=2, fake_warm_start=4, fake_updates=1))
    method.roles.become("waypoint-1", "fake")
    first = next(step for step in range(10) if method.turn(step).network == "student")
    _, logs = loss_of(method, Turn("student", first), toy_batch(8, first))
    assert float(logs["field"]) == 0.0
    later = first + 2 * method.options.interval
    assert float(loss_of(method, Turn("student", later), toy_batch(8, later))[1]["field"]) > 0


def test_a_gaussian_student_follows_the_waypoints_home():
    """Waypoints at means between the student's and the teacher's: its mean comes nearer to each while it is the target,
    and ends at the teacher's."""
    teacher = ToyTeacher(Gaussian(PATH, MU, S), PATH)
    options = DisBack.Options(waypoints=4, fake_warm_start=8, fake_updates=1, interval=60)
    method = DisBack(Copies(teacher, toy_student(Affine(-2.0, S), PATH)), (1.0,), options)
    for number in (1, 2, 3):
        method.roles[f"waypoint-{number}"].net = Gaussian(PATH, MU - number, S).requires_grad_(False)
    optimizer = torch.optim.SGD(method.student.net.parameters(), lr=0.3)
    away: dict[int, list[float]] = {}
    for step in range(8, 8 + 2 * 4 * 60):
        if method.turn(step).network == "student":
            mean = method.student.net.shift.item()
            method.fake.net = Gaussian(PATH, mean, method.student.net.scale.item())
            away.setdefault(method.target_of(step), []).append(abs(mean - (MU - method.target_of(step))))
            optimizer.zero_grad()
            loss_of(method, Turn("student", step), toy_batch(64, step))[0].backward()
            optimizer.step()
    assert list(away) == [3, 2, 1, 0]
    for number, distances in away.items():
        assert distances[-1] < 0.2, (number, distances[-1])
        far = [d for d in distances if d > 0.2]
        assert far == sorted(far, reverse=True)


def test_the_degradation_brings_the_fake_network_to_the_students_samples():
    method = method_of(net=Affine(-1.0, 0.3), waypoints=3, fake_warm_start=120)
    fake = modules_of(method)["fake"]
    optimizer = torch.optim.Adam(fake.parameters(), lr=1e-2)
    losses = []
    for step in range(120):
        optimizer.zero_grad()
        loss = loss_of(method, Turn("fake", step), toy_batch(128, step))[0]
        loss.backward()
        optimizer.step()
        method.after_step(Turn("fake", step))
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    batch = toy_batch(256, 500)
    with torch.no_grad():
        x, t = torch.full((256, 2, 1, 1), -1.0), torch.full((256,), 0.5)
        x_t = PATH.noised(x, batch.noise, t)
        errors = [
            float((net.predict(x_t, t, batch.cond).x0 - x).square().mean())
            for net in (method.teacher, method.roles["waypoint-1"], method.roles["waypoint-2"], method.fake)
        ]
    assert errors == sorted(errors, reverse=True)


def test_too_few_updates_for_the_waypoints_are_refused():
    with pytest.raises(UserError, match="waypoints is 5, but 3 updates"):
        method_of(waypoints=5, fake_warm_start=3)
