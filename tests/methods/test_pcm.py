"""PCM against closed forms: phases and their edges, the exact map, the two ends of the number of phases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from consistency_toy import error, mixture_method, table_path, train
from torch import nn

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.consistency import consistency_function
from stepdistill.methods.pcm import PCM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.parallel import take_turn

MU, S = 0.7, 0.4
FOUR = (1.0, 0.75, 0.5, 0.25)


def pcm(path, student, times=FOUR, output="x0", **options):
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    return PCM(
        Copies(teacher, toy_student(student, path, output)),
        times,
        PCM.Options(**{"guidance": 1.0, **options}),
    )


def data_batch(count=512, step=0, deviation=S):
    return toy_batch(count, step, pairs=lambda z: MU + deviation * z)


class PhaseMap(nn.Module):
    """The x0 whose jump to the edge e of t's phase is the Gaussian's exact flow map (card 3.3): with Phi the state at
    e, x0 = (Phi - (sigma_e / sigma) x) / (alpha_e - (sigma_e / sigma) alpha)."""

    def __init__(self, path, times):
        super().__init__()
        self.path, self.edges = path, torch.tensor([*times[1:], 0.0]).flip(0)
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t, cond):
        e = self.edges[torch.searchsorted(self.edges, t) - 1]
        (alpha, sigma), (alpha_e, sigma_e) = (
            tuple(per_sample(value, x) for value in self.path.alpha_sigma(time)) for time in (t, e)
        )
        spread, spread_e = ((a * S).square() + b.square() for a, b in ((alpha, sigma), (alpha_e, sigma_e)))
        state = alpha_e * MU + (spread_e / spread).sqrt() * (x - alpha * MU)
        ratio = sigma_e / sigma
        return (state - ratio * x) / (alpha_e - ratio * alpha) + self.offset


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()], ids=["flow", "trig"])
def test_squared_residual_at_the_exact_map_falls_with_the_fourth_power_of_the_step(path):
    """Every t has one edge, so the first-order map can be exact, and the DDIM step's h^2 is all that is left."""
    squares = []
    for grid in (20, 40, 80):
        method = pcm(path, PhaseMap(path, FOUR), grid=grid)
        squares.append(float(loss_of(method, "student", data_batch(4096))[1]["residual"]) ** 2)
    for coarse, fine in pairwise(squares):
        assert 10 < coarse / fine < 22


@pytest.mark.parametrize("path", [FlowPath(), table_path()], ids=["flow", "table"])
def test_the_exact_map_draws_the_end_of_the_trajectory_in_one_step_a_phase(path):
    z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    method = pcm(path, PhaseMap(path, FOUR).requires_grad_(False))
    alpha, sigma = (float(value) for value in path.alpha_sigma(torch.tensor(1.0)))
    start = alpha * MU + ((alpha * S) ** 2 + sigma**2) ** 0.5 * z
    drawn = method.sampler().draw(method.student, start, Condition(), lambda call: z)
    torch.testing.assert_close(drawn, MU + S * z, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("path", [FlowPath(), TrigPath(), table_path()], ids=["flow", "trig", "table"])
def test_with_as_many_phases_as_grid_times_the_teacher_is_the_solution(path):
    """Then the target is the teacher's own DDIM step to the edge, whatever the student is (card: M = 50)."""
    method = pcm(path, Gaussian(path, MU, S), grid=4)
    assert float(loss_of(method, "student", data_batch())[0]) == 0.0
    other = pcm(path, Perceptron(), grid=4)
    batch = data_batch()
    jumped, target, _, e, cond = other.two_jumps(batch)
    start, t, s, same = other.phase_times(batch)
    assert torch.equal(start, t) and torch.equal(s, e) and torch.equal(same, e)
    z = torch.where(
        per_sample(t == 1, jumped),
        batch.draws.normal("eps", SHAPE),
        path.noised(batch.pairs.x0, batch.draws.normal("eps", SHAPE), t),
    )
    torch.testing.assert_close(target, other.teacher.predict(z, t, cond).at(e))


def test_with_one_phase_it_is_consistency_to_clean_data():
    """M = 1: jump and target are the consistency function x0 of LCM on a flow path."""
    path = FlowPath()
    method = pcm(path, Perceptron(), times=(1.0,), output="velocity", grid=10)
    batch = data_batch()
    start, t, s, e = method.phase_times(batch)
    assert bool((start == 1).all()) and not bool(e.any())
    x_t = path.noised(batch.pairs.x0, batch.draws.normal("eps", SHAPE), t)
    x_s = method.teacher.predict(x_t, t, batch.cond).at(s)
    jumped, target, *_ = method.two_jumps(batch)
    torch.testing.assert_close(jumped, consistency_function(method.student, x_t, t, batch.cond))
    torch.testing.assert_close(target, consistency_function(method.student, x_s, s, batch.cond))


def test_an_edge_belongs_to_the_phase_below_and_ends_the_one_above():
    """start >= t > s >= e; the edges are exactly the student's times, also where they are uneven."""
    times = (1.0, 0.9, 0.6, 0.3)
    method = pcm(FlowPath(), Perceptron(), times=times, grid=50)
    start, t, s, e = method.phase_times(data_batch(4000))
    assert bool((start >= t).all()) and bool((t > s).all()) and bool((s >= e).all())
    assert set(start.tolist()) == {float(torch.tensor(time)) for time in times}
    for time, edge in zip(times, (*times[1:], 0.0), strict=True):
        phase = start == torch.tensor(time)
        assert bool((e[phase] == torch.tensor(edge)).all())
        assert float(t[phase].max()) == float(torch.tensor(time))
        assert float(s[phase].min()) == float(torch.tensor(edge))


def test_a_pair_is_one_time_of_the_grid_apart():
    """48 times make 12 a phase of a quarter; from each to the next below, on the schedule before its shift."""
    path = FlowPath(3.0)
    method = pcm(path, Perceptron(), times=tuple(path.shifted(torch.tensor(FOUR)).tolist()), grid=48)
    _, t, s, _ = method.phase_times(data_batch(500))
    gaps = path.unshifted(t) - path.unshifted(s)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 48), atol=1e-5, rtol=0)


def test_at_the_edge_the_target_is_the_teachers_point_and_not_the_students_jump():
    """A network that says nonsense leaves the target of the lowest pair untouched (card: c_skip at the edge)."""
    path = FlowPath()
    batch, targets = data_batch(), []
    for seed in (1, 2):
        method = pcm(path, Perceptron(seed=seed), output="velocity")
        _, target, _, e, _ = method.two_jumps(batch)
        targets.append(target[method.phase_times(batch)[2] == e])
    assert len(targets[0]) > 10
    assert torch.equal(*targets)


def test_the_target_holds_no_graph():
    method = pcm(FlowPath(), Perceptron(), output="velocity")
    jumped, target, *_ = method.two_jumps(data_batch(8))
    assert jumped.requires_grad and not target.requires_grad


def gan_method():
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    student = toy_student(Perceptron(seed=1), path, "velocity")
    return PCM(Copies(teacher, student), FOUR, PCM.Options(adversarial_weight=0.1, guidance=1.0))


@pytest.mark.parametrize("turn", ["student", "discriminator"])
def test_adversarial_turns_reach_only_their_network(turn):
    method = gan_method()
    assert [method.turn(step).network for step in range(4)] == ["discriminator", "student"] * 2
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    take_turn(trained, turn)
    loss_of(method, turn, data_batch(16))[0].backward()
    for name, parameters in trained.items():
        assert any(p.grad is not None and bool(p.grad.any()) for p in parameters) == (name == turn)
    assert all(p.grad is None for p in method.teacher.denoiser.net.parameters())


def told_apart(method, batch):
    """Logits of the student's jumps and of their targets around 0, by a head whose weights are large."""
    jumped, target, start, e, cond = method.two_jumps(batch)
    *weights, bias = method.gan.parameters()
    with torch.no_grad():
        for seed, weight in enumerate(weights):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
        bias -= method.gan.logits_above(target, e, start, cond, batch).mean()
        return [method.gan.logits_above(x, e, start, cond, batch) for x in (jumped, target)]


def test_the_generators_term_raises_the_logits_of_its_jumps():
    method, batch = gan_method(), data_batch(64)
    fake, _ = told_apart(method, batch)
    loss, logs = loss_of(method, "student", batch)
    assert logs["gan"].item() == pytest.approx(-float(fake.mean()), rel=1e-5)
    method.gan = None
    alone = loss_of(method, "student", batch)[0]
    assert (loss - alone).item() == pytest.approx(-0.1 * float(fake.mean()), rel=1e-3)


def test_the_discriminators_loss_is_the_hinge():
    """mean(max(0, 1 - D(target)) + max(0, 1 + D(jump))): none beyond the margin counts."""
    method, batch = gan_method(), data_batch(64)
    fake, real = told_apart(method, batch)
    assert (
        bool((real > 1).any())
        and bool((real < 1).any())
        and bool((fake < -1).any())
        and bool((fake > -1).any())
    )
    hinge = (1 - real).relu() + (1 + fake).relu()
    torch.testing.assert_close(loss_of(method, "discriminator", batch)[0], hinge.mean())


def test_the_discriminator_cannot_tell_a_consistent_student():
    """Where jump and target agree both are noised alike, so the hinge loss is 2 at any logit within the margin."""
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    student = toy_student(
        Perceptron(), path, "velocity"
    )  # equal weights; with one grid time a phase it is exact
    method = PCM(Copies(teacher, student), FOUR, PCM.Options(adversarial_weight=0.1, guidance=1.0, grid=4))
    assert float(loss_of(method, "discriminator", data_batch(64))[0]) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.slow
def test_training_brings_a_step_a_phase_to_the_end_of_the_ode():
    method = mixture_method(PCM, (1.0, 0.5), source="images", guidance=1.0, start_share=0.3, grid=16)
    before = error(method, 2)
    after = error(train(method, 600, lr=5e-3), 2)
    print(f"two steps: {before:.3f} -> {after:.3f}")
    assert after < 0.5 * before
