"""TSCD against closed forms: its segments and stages, TCD as its last stage, its floor, and its optional terms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from consistency_toy import error, mixture_method, table_path, train
from torch import nn

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.losses.consistency import noised
from stepdistill.losses.fake_score import views_of
from stepdistill.methods.tcd import TCD
from stepdistill.methods.tscd import TSCD
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    Perceptron,
    ToyTeacher,
    clear,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.parallel import take_turn

MU, S = 0.7, 0.4
PATHS = [FlowPath(), TrigPath(), table_path()]
NAMES = ["flow", "trig", "table"]


def tscd(path, student, unguided=None, deviation=S, output="x0", **options):
    teacher = ToyTeacher(Gaussian(path, MU, deviation), path, unguided=unguided)
    return TSCD(
        Copies(teacher, toy_student(student, path, output)),
        (1.0,),
        TSCD.Options(**{"guidance": 1.0, **options}),
    )


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


def test_lower_edges_are_those_of_the_card():
    """T = 1000, k = 8: 140 -> 125, 125 -> 0, 500 -> 375, 1000 -> 875 (card 3.4). With a teacher step as long as the
    path the end is the edge itself."""
    method = tscd(FlowPath(), Perceptron(), segments=(8,), grid=1000, skip=1000)
    batch = data(4000)
    n = batch.draws.integers("time", 1000) + 1
    _, _, e, start, _ = method.two_jumps(batch, batch.draws.step)
    torch.testing.assert_close(e * 1000, (n - 1) // 125 * 125.0, atol=1e-3, rtol=0)
    torch.testing.assert_close(start - e, torch.full_like(e, 0.125))
    for time, edge in ((140, 125), (125, 0), (500, 375), (1000, 875)):
        assert (time - 1) // 125 * 125 == edge and float(e[n == time].mean()) == pytest.approx(
            edge / 1000, abs=1e-6
        )


def test_stages_follow_one_another_and_the_last_goes_on():
    method = tscd(FlowPath(), Perceptron(), stage_updates=10)
    assert [method.segments(step) for step in (0, 9, 10, 19, 20, 29, 30, 39, 40, 10_000)] == [
        8, 8, 4, 4, 2, 2, 1, 1, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("segments", [(3,), (4, 8), (), (0,)])
def test_segments_that_do_not_fit_the_grid_are_refused(segments):
    with pytest.raises(UserError, match=r"options\.segments is .* divide options\.grid=40"):
        tscd(FlowPath(), Perceptron(), segments=segments)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_one_segment_is_tcd(path):
    """The last stage and TCD are one loss, number for number, on any path and with guidance."""
    options = {"guidance": 2.5, "grid": 40, "skip": 3, "noise_share": 0.2, "huber": 0.001}
    ours = tscd(path, Perceptron(), Gaussian(path, 0.2, S), output="velocity", stage_updates=1, **options)
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, 0.2, S))
    theirs = TCD(Copies(teacher, toy_student(Perceptron(), path, "velocity")), (1.0,), TCD.Options(**options))
    batch = data(step=3)
    assert torch.equal(loss_of(ours, "student", batch)[0], loss_of(theirs, "student", batch)[0])
    assert not torch.equal(
        loss_of(ours, "student", data(step=2))[0], loss_of(theirs, "student", data(step=2))[0]
    )


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_segment_of_one_teacher_step_is_the_teachers_step(path):
    """As many segments as grid times: the target is the teacher's point, and the teacher itself has no loss."""
    method = tscd(path, Gaussian(path, MU, S), segments=(10,), grid=10)
    assert float(loss_of(method, "student", data())[1]["residual"]) < 2e-6


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_loss_is_zero_where_trajectories_are_straight(path):
    """A point mass: x0 and eps stay put, so one pair of them is right for every end of every stage."""
    method = tscd(path, Gaussian(path, MU, 0.0), deviation=0.0, stage_updates=1)
    for step in range(4):
        batch = toy_batch(64, step, pairs=lambda z: torch.full_like(z, MU))
        assert float(loss_of(method, "student", batch)[1]["residual"]) < 2e-6


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_shorter_the_segments_the_nearer_is_the_teacher_to_the_solution(path):
    """Why stages begin with eight: the untrained student's squared distance from the exact state at its segment's edge
    at least doubles with each stage."""
    squares = []
    for segments in (8, 4, 2, 1):
        method = tscd(path, Gaussian(path, MU, S).requires_grad_(False), segments=(segments,), skip=40)
        batch = data(2000)
        jumped, _, e, _, _ = method.two_jumps(batch, batch.draws.step)
        t = (batch.draws.integers("time", 40) + 1) / 40
        z = noised(path, batch.pairs.x0, batch.draws.normal("eps", SHAPE), t)
        (alpha, sigma), (alpha_e, sigma_e) = path.alpha_sigma(t), path.alpha_sigma(e)
        spread = ((alpha_e * S).square() + sigma_e.square()) / ((alpha * S).square() + sigma.square())
        exact = per_sample(alpha_e, z) * MU + per_sample(spread.sqrt(), z) * (z - per_sample(alpha, z) * MU)
        squares.append(float((jumped - exact).square().mean()))
    assert all(longer > 2 * shorter for shorter, longer in pairwise(squares)), squares


def test_ends_stay_in_the_segment_and_the_lowest_is_timestep_0():
    """Edge <= e <= s < t <= start, every end of the segment drawn."""
    path = table_path()
    method = tscd(path, Gaussian(path, MU, S), segments=(4,))
    batch = data(4000)
    n = batch.draws.integers("time", 40) + 1
    _, _, e, start, _ = method.two_jumps(batch, batch.draws.step)
    low = ((n - 1) // 10 * 10 / 40).clamp_min(1 / 1000)
    assert bool((e >= low - 1e-6).all()) and bool((e < n / 40).all()) and bool((start >= n / 40 - 1e-6).all())
    assert float(e.min()) == pytest.approx(1 / 1000)
    top = e[n == 40] * 40  # uniform on 30 .. 39
    assert float(top.mean()) == pytest.approx(34.5, abs=4 * 2.9 / len(top) ** 0.5)


def with_critics(path=None, **options):
    path = path or FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    chosen = {"guidance": 1.0, "adversarial_weight": 0.1, "score_weight": 1.0, "stage_updates": 10, **options}
    return TSCD(Copies(teacher, toy_student(Perceptron(), path, "velocity")), (1.0,), TSCD.Options(**chosen))


def test_the_optional_terms_begin_with_their_stage_and_reach_only_whose_turn_it_is():
    method = with_critics()
    assert all(method.turn(step).network == "student" for step in range(20))
    assert [method.turn(step).network for step in range(20, 24)] == ["fake", "student"] * 2
    assert set(loss_of(method, "student", data(step=19))[1]) == {"residual"}
    assert set(loss_of(method, "student", data(step=20))[1]) == {"residual", "gan", "field"}
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    for turn, step, logs in (
        ("fake", 20, {"discriminator", "denoising"}),
        ("student", 21, {"residual", "gan", "field"}),
    ):
        clear(method)
        take_turn(trained, turn)
        loss, said = loss_of(method, turn, data(step=step))
        loss.backward()
        assert set(said) == logs
        for name, parameters in trained.items():
            assert any(p.grad is not None and bool(p.grad.any()) for p in parameters) == (name == turn)
    assert all(p.grad is None for p in method.teacher.denoiser.net.parameters())
    assert set(modules_of(with_critics(adversarial_weight=0.0, score_weight=0.0))) == {"student"}


def test_each_term_is_added_at_its_weight():
    """The squared residual, beside it the generator's loss, and the pull against DMD's field on one-step samples."""
    batch, plain = data(step=40), with_critics(adversarial_weight=0.0, score_weight=0.0)
    alone, logs = loss_of(plain, "student", batch)
    assert alone.item() == pytest.approx(float(logs["residual"]) ** 2, rel=1e-5)

    method = with_critics(adversarial_weight=0.3, score_weight=0.0)
    loss, logs = loss_of(method, "student", batch)
    jumped, _, e, start, cond = method.two_jumps(batch, batch.draws.step)
    generator = nn.functional.softplus(-method.gan.logits_above(jumped, e, start, cond, batch)).mean()
    assert (loss - alone).item() == pytest.approx(0.3 * generator.item(), rel=1e-4)

    method = with_critics(adversarial_weight=0.0, score_weight=0.2, score_guidance=2.0)
    method.teacher.unguided = toy_student(Perceptron(seed=3), FlowPath(), "velocity")
    loss, logs = loss_of(method, "student", batch)
    x = method.student.predict(batch.noise, torch.ones(64), batch.cond).x0
    views = views_of(method.fake, method.teacher, x.detach(), batch, method.options, 2.0)
    field = views.error / views.distance
    assert not logs["field"].requires_grad
    assert float(logs["field"]) == pytest.approx(float(field.abs().mean()), rel=1e-4)
    assert (loss - alone).item() == pytest.approx(0.1 * float(field.square().mean()), rel=1e-3)
    weights = list(method.student.net.parameters())
    ours = torch.autograd.grad(loss, weights)
    pull = 0.2 * (x * field.detach()).mean()  # descent moves the samples against the field
    wanted = torch.autograd.grad(loss_of(plain, "student", batch)[0], list(plain.student.net.parameters()))
    for got, regressed, pulled in zip(ours, wanted, torch.autograd.grad(pull, weights), strict=True):
        torch.testing.assert_close(got, regressed + pulled, rtol=1e-3, atol=1e-5)


def test_the_score_term_is_zero_where_the_fake_network_is_the_teacher():
    """Unguided and at its start; under a guidance it is not."""
    batch = data(step=40)
    assert float(loss_of(with_critics(), "student", batch)[1]["field"]) == 0
    method = with_critics(score_guidance=2.0)
    method.teacher.unguided = toy_student(Perceptron(seed=3), FlowPath(), "velocity")
    assert float(loss_of(method, "student", batch)[1]["field"]) > 0.01


def test_the_discriminator_cannot_tell_a_consistent_student():
    """Jump and target agree where a segment is one teacher step: both are noised alike, D and -D cancel around ln 4."""
    method = with_critics(segments=(4,), grid=4, critic_segments=4, score_weight=0.0)
    with torch.no_grad():
        for parameter in method.gan.head.body[-1].parameters():
            parameter.zero_()
    loss = loss_of(method, "fake", data())[0]
    assert float(loss) == pytest.approx(2 * 0.6931472, abs=1e-5)
    loss.backward()
    # Real and generated features are equal, so the gradients of the two softplus terms at logit 0 are opposite.
    assert all(float(p.grad.abs().max()) < 1e-6 for p in method.gan.head.parameters())


def test_the_sampler_of_the_method():
    """TCDScheduler at the segments' edges on a table; deterministic on a flow path."""
    from diffusers import DDPMScheduler

    path = table_path()
    method = tscd(path, Perceptron(), gamma=0.5)
    teacher_scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler = stock_scheduler(method.sampler(), path, teacher_scheduler)
    assert type(scheduler).__name__ == "TCDScheduler" and method.sampler().call_arguments() == {"eta": 0.5}
    for steps in (1, 2, 4, 8):
        times = on_stock_grid(method.sampler(), path, teacher_scheduler, steps).times
        assert times == pytest.approx([1 - i / steps for i in range(steps)])
    assert tscd(path, Perceptron(), renoise=False).sampler().gamma == 0
    flow = tscd(FlowPath(), Perceptron()).sampler()
    assert (flow.gamma, flow.renoise) == (None, False)


@pytest.mark.slow
def test_training_through_the_stages_brings_few_steps_to_the_end_of_the_ode():
    """One step loses a third of its error and more (of three seeds, 0.46 to 0.54 of it); four steps are at their floor
    before, and stay there."""
    method = mixture_method(
        TSCD,
        source="images",
        guidance=1.0,
        noise_share=0.2,
        grid=16,
        stage_updates=90,
        target_decay=0.5,
        huber=0.03,
    )
    before = {steps: error(method, steps) for steps in (1, 4)}
    train(method, 480, lr=5e-3, batch=32)
    after = {steps: error(method, steps) for steps in (1, 4)}
    print(f"before {before}, after {after}")
    assert after[1] < 0.65 * before[1]
    assert after[4] < 1.2 * before[4]  # where a first-order map has its floor


@pytest.mark.parametrize(("adversarial", "score"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_critics_of_either_kind_are_one_network_that_follows(adversarial, score):
    method = with_critics(adversarial_weight=adversarial, score_weight=score)
    trained = method.trained()["fake"]
    assert trained.role == ("fake" if score else None) and trained.follows
    assert (trained.extra is not None) == bool(adversarial)
    early = [method.turn(step).network for step in range(method.early)]
    assert set(early) == {"student"}
    assert "fake" in {method.turn(step).network for step in range(method.early, method.early + 10)}
