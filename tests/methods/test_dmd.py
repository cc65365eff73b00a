"""DMD against closed forms on Gaussians (cards B1, B2 and the tests of DMD and DMD2)."""

from __future__ import annotations

import math

import pytest
import torch
from mixture_toy import Batched
from table_toy import TABLE, gaussian_eps
from torch import nn

from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.decoupled_guidance import augmentation
from stepdistill.losses.fake_score import views_of
from stepdistill.losses.first_step import first_step_loss, x0_of_jump
from stepdistill.losses.gan import discriminator_loss, generator_loss
from stepdistill.methods.dmd import DMD
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.8
PATHS = [FlowPath(), TrigPath()]


def many(count):
    """A large batch whose numbers come from one generator a stream."""
    draws = Batched(0, 0, 0, count)
    return Batch(draws, SHAPE, Condition(), torch.zeros(draws.count))


def dmd(path, shift, scale, times=(1.0,), **options):
    """DMD of a Gaussian teacher with an affine student and a fake network that is exact for it."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = DMD(Copies(teacher, toy_student(Affine(shift, scale), path)), times, DMD.Options(**options))
    method.fake.net = Gaussian(path, shift, scale)
    return method


@pytest.mark.parametrize("path", PATHS)
def test_field_is_the_closed_form_of_a_mean_shift(path):
    """With equal deviations e = x0_fake - x0_real = (m - mu) sigma^2 / V at every x_t, over mean|x - x0_real|."""
    method, batch = dmd(path, MU + 0.3, S), toy_batch(64)
    x = method.generate(batch).detach()
    field = method.field(x, batch)
    t = batch.draws.uniform("score t", 0.02, 0.98)
    alpha, sigma = path.alpha_sigma(t)
    variance = alpha**2 * S**2 + sigma**2
    x_t = path.noised(x, batch.draws.normal("score eps", SHAPE), t)
    real = method.teacher.predict(x_t, t, batch.cond).x0
    scale = (x - real).abs().flatten(1).mean(1)
    expected = (0.3 * sigma**2 / variance / scale)[:, None].expand(-1, 2)
    torch.testing.assert_close(field.flatten(1), expected, rtol=1e-4, atol=1e-5)
    assert bool((field > 0).all())  # the sign of m - mu: descent moves the mean back


@pytest.mark.parametrize("path", PATHS)
def test_field_without_its_normaliser_is_the_gradient_of_the_kl(path):
    """The field times mean|x - x0_real| alpha^2 / sigma^2 is alpha (s_f - s_r): its mean is alpha^2 (m - mu) / V_r, and
    its mean product with z is alpha^2 k (1 / V_r - 1 / V_f) (card B2)."""
    m, k, time = MU - 0.4, 1.1, 0.5
    method, batch = dmd(path, m, k, score_times=(time, time), guidance=1.0), many(20_000)
    with torch.no_grad():
        x = method.generate(batch)
        size = method.views(x, batch).distance
        alpha, sigma = (float(value) for value in path.alpha_sigma(torch.tensor(time)))
        gradient = method.field(x, batch) * size * alpha**2 / sigma**2
    real, fake = (alpha**2 * s**2 + sigma**2 for s in (S, k))
    assert float(gradient.mean()) == pytest.approx(alpha**2 * (m - MU) / real, abs=0.03)
    by_scale = float((gradient * batch.noise).mean())
    assert by_scale == pytest.approx(alpha**2 * k * (1 / real - 1 / fake), abs=0.03)


def test_gradient_of_the_loss_is_the_field_over_the_element_count():
    """d/dx of 1/2 mean (x - sg[x - field])^2 is field / (B C H W)."""
    method, batch = dmd(FlowPath(), MU + 0.5, 1.2), toy_batch(16)
    loss, _ = loss_of(method, "student", batch)
    loss.backward()
    with torch.no_grad():
        x = method.generate(batch)
        field = method.field(x, batch)
    gradient = method.student.net.shift.grad
    assert float(gradient) == pytest.approx(float(field.sum() / field.numel()), rel=1e-5)


def test_gradient_is_zero_at_the_optimum():
    """With the fake network equal to the teacher the field is zero at every point, not in the mean only."""
    method = dmd(FlowPath(), MU, S)
    loss, logs = loss_of(method, "student", toy_batch(256))
    loss.backward()
    assert float(logs["field"]) == 0.0
    assert not any(value.requires_grad for value in logs.values())
    assert float(method.student.net.shift.grad) == 0.0
    assert float(method.student.net.scale.grad) == 0.0


@pytest.mark.parametrize("guidance", [1.0, 1.5, 2.5])
def test_guidance_moves_the_fixed_point_as_it_moves_the_teacher(guidance):
    """Conditional N(c, s), unconditional N(u, s): the guided denoiser is that of mean u + g (c - u)."""
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, 0.2, S))
    goal = 0.2 + guidance * (MU - 0.2)
    method = DMD(Copies(teacher, toy_student(Affine(goal, S), path)), (1.0,), DMD.Options(guidance=guidance))
    method.fake.net = Gaussian(path, goal, S)
    with torch.no_grad():
        field = method.field(method.generate(toy_batch(64)), toy_batch(64))
    assert float(field.abs().max()) < 1e-4


@pytest.mark.parametrize("interval", ["guidance_interval", "score_guidance_interval"])
def test_guidance_is_on_inside_its_interval_and_off_outside(interval):
    """Where t <= 0.5 the error is that of the guided teacher, elsewhere that of the plain one, sample by sample."""
    path, null, scale = FlowPath(), 0.2, 4.0
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, null, S))
    options = DMD.Options(guidance=scale, **{interval: (0.0, 0.5)})
    method, batch = DMD(Copies(teacher, toy_student(Affine(MU, S), path)), (1.0,), options), toy_batch(64)
    method.fake.net = Gaussian(path, MU, S)
    with torch.no_grad():
        views = method.views(method.generate(batch), batch)
    alpha, sigma = path.alpha_sigma(views.t)
    guided = -(scale - 1) * (MU - null) * sigma**2 / (alpha**2 * S**2 + sigma**2)
    expected = torch.where(views.t <= 0.5, guided, torch.zeros_like(guided))[:, None].expand(-1, 2)
    torch.testing.assert_close(views.error.flatten(1), expected, rtol=1e-3, atol=1e-5)
    assert 10 < int((views.t <= 0.5).sum()) < 54


def test_exact_fake_network_minimises_its_loss():
    """The denoiser of the student's own law has the least loss; a shifted or widened one has more."""
    losses = {}
    for shift, scale in ((MU, S), (MU + 0.1, S), (MU - 0.1, S), (MU, S + 0.1), (MU, S - 0.1)):
        method = dmd(FlowPath(), MU, S)
        method.fake.net = Gaussian(FlowPath(), shift, scale)
        losses[shift, scale] = float(loss_of(method, "fake", toy_batch(4000))[0])
    assert min(losses, key=losses.__getitem__) == (MU, S)


def test_constant_logits_of_zero():
    """L_D = 2 ln 2, and d L_G / d logit = -1/2 (DMD2 card, test 5)."""
    zeros = torch.zeros(8, requires_grad=True)
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))
    generator_loss(zeros).backward()
    torch.testing.assert_close(zeros.grad, torch.full((8,), -0.5 / 8))


def gan_method(times=(1.0, 0.75, 0.5, 0.25)):
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    options = DMD.Options(adversarial_weight=0.1, pair_weight=0.25, fake_updates=2)
    return DMD(Copies(teacher, toy_student(Perceptron(seed=1), path, "velocity")), times, options)


def full_batch(count=8, step=5):
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    return toy_batch(count, step=step, pairs=lambda z: MU + S * z, images=images)


@pytest.mark.parametrize("turn", ["student", "fake"])
def test_gradients_reach_only_the_network_whose_turn_it_is(turn):
    from stepdistill.training.parallel import take_turn

    method = gan_method()
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    take_turn(trained, turn)
    loss_of(method, turn, full_batch())[0].backward()
    for name, parameters in trained.items():
        assert all((p.grad is not None) == (name == turn) for p in parameters)
    assert all(p.grad is None for p in method.teacher.denoiser.net.parameters())


def test_the_field_is_made_without_a_graph():
    """Only the student's own call records one: both scores of its sample are numbers (DMD eq. 7)."""
    method, graphs = dmd(FlowPath(), 1.0, 1.2), []
    for net in (method.teacher.denoiser.net, method.fake.net):
        net.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad))
    loss_of(method, "student", toy_batch(4))
    assert graphs == [False, False]


@pytest.mark.parametrize("step", range(6))
def test_only_the_last_call_of_a_rollout_has_a_graph(step):
    """Backward simulation: calls before the exit run without a graph; one call holds one (DMD2 card, test 9)."""
    method, graphs = gan_method(), []
    hook = method.student.net.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad))
    method.generate(full_batch(step=step))
    hook.remove()
    assert graphs[:-1] == [False] * (len(graphs) - 1)
    assert graphs[-1] is True


def test_rollout_meets_the_states_of_the_sampler():
    """Stopped before call i, training's state is the sampler's own; all exits occur."""
    method, exits = gan_method(), set()
    sampler = method.sampler()
    for step in range(40):
        batch = full_batch(4, step)
        calls = batch.draws.shared_integer("exit", 4)
        exits.add(calls)

        def fresh(i, batch=batch):
            return batch.draws.normal(f"renoise {i}", SHAPE)

        state = sampler.walk(method.student, batch.noise, batch.cond, fresh, calls)
        t = torch.full((4,), method.times[calls])
        torch.testing.assert_close(method.generate(batch), method.student.predict(state, t, batch.cond).x0)
    assert exits == {0, 1, 2, 3}


def test_turns_follow_the_two_time_scales():
    """fake_updates fake updates for each of the student's, after the warm starts."""
    path = FlowPath()
    options = DMD.Options(fake_updates=4, warm_start=3, fake_warm_start=2)
    method = DMD(
        Copies(ToyTeacher(Affine(0.0, 1.0), path), toy_student(Affine(0.0, 1.0), path)), (1.0,), options
    )
    turns = [method.turn(step).network for step in range(55)]
    assert turns[:3] == ["student"] * 3
    assert turns[3:5] == ["fake"] * 2
    assert turns[5:10] == ["fake"] * 4 + ["student"]
    assert turns[5:].count("student") == 10


@pytest.mark.slow
def test_gradient_flow_brings_a_gaussian_student_home():
    """A few hundred alternating updates of exact Gaussian students: mean and deviation come within 0.04."""
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = DMD(Copies(teacher, toy_student(Affine(-0.5, 0.3), path)), (1.0,), DMD.Options(fake_updates=5))
    method.fake.net = Gaussian(path, MU, S).requires_grad_(True)
    optimizers = {
        name: torch.optim.Adam(net.parameters(), lr=0.02, betas=(0.5, 0.9))
        for name, net in modules_of(method).items()
    }
    for step in range(1800):
        turn = method.turn(step).network
        optimizers[turn].zero_grad()
        loss_of(method, turn, toy_batch(64, step))[0].backward()
        optimizers[turn].step()
        if step == 1200:
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = 0.004
    assert float(method.student.net.shift) == pytest.approx(MU, abs=0.04)
    assert abs(float(method.student.net.scale)) == pytest.approx(S, abs=0.04)


def test_networks_are_two_and_share_no_weight():
    networks = modules_of(gan_method())
    assert set(networks) == {"student", "fake"}
    assert not {id(p) for p in networks["student"].parameters()} & {
        id(p) for p in networks["fake"].parameters()
    }
    assert isinstance(networks["fake"], nn.ModuleList) and len(networks["fake"]) == 2


# --- guidance at a time of its own (card 11) ---------------------------------------------------------------------

NULL, SCALE = 0.2, 3.0


def guided(path, times=(1.0,), **options):
    """DMD of a guided Gaussian teacher, with a fake network that is exact for N(1, S^2)."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, NULL, S))
    method = DMD(
        Copies(teacher, toy_student(Affine(1.0, S), path)), times, DMD.Options(guidance=SCALE, **options)
    )
    method.fake.net = Gaussian(path, 1.0, S)
    return method


@pytest.mark.parametrize("path", PATHS)
def test_at_one_time_the_two_parts_are_dmds_error(path):
    """x0_fake - x0_guided = (x0_fake - x0_real) - (g - 1) (x0_real - x0_null) at the same x_t, and the latter is
    (g - 1) (mu_c - mu_u) sigma^2 / V."""
    method, batch = guided(path), toy_batch(32)
    x = method.generate(batch).detach()
    views = method.views(x, batch)
    towards, plain = augmentation(method.teacher, views.x_t, views.t, batch.cond, SCALE)
    torch.testing.assert_close(views.fake.x0 - plain - towards, views.error, rtol=1e-4, atol=1e-5)
    alpha, sigma = path.alpha_sigma(views.t)
    expected = (SCALE - 1) * (MU - NULL) * sigma**2 / (alpha**2 * S**2 + sigma**2)
    torch.testing.assert_close(towards.flatten(1), expected[:, None].expand(-1, 2), rtol=1e-3, atol=1e-4)


def test_without_guidance_decoupling_changes_nothing():
    one, two = (dmd(FlowPath(), 1.0, 1.2, guidance=1.0, decoupled=decoupled) for decoupled in (False, True))
    batch = toy_batch(16)
    assert torch.equal(loss_of(one, "student", batch)[0], loss_of(two, "student", batch)[0])


def test_decoupled_guidance_acts_at_any_scale_and_leaves_no_graph():
    batch = toy_batch(16)
    plain = guided(FlowPath(), score_guidance=1.0, decoupled=True)
    method = guided(FlowPath(), score_guidance=1.5, decoupled=True)
    (_, one), (_, other) = (loss_of(each, "student", batch) for each in (plain, method))
    assert float((other["field"] - one["field"]).abs()) > 0.01
    assert not other["field"].requires_grad


@pytest.mark.parametrize("start", [1.0, 0.6])
@pytest.mark.parametrize("step", range(4))
def test_guidance_acts_below_the_time_of_the_students_call(step, start):
    """With times 1 and 0.5 its time is under 0.98 or 0.5, and the field is the closed form there. Wherever the first
    call is, it is handed pure noise, so its time is under 0.98."""
    path, method = FlowPath(), guided(FlowPath(), times=(start, 0.5), decoupled=True)
    batch = toy_batch(16, step)
    x = method.generate(batch).detach()
    views = views_of(method.fake, method.teacher, x, batch, method.options, 1.0)
    assert not views.error.requires_grad  # a graph through the inputs must be asked for
    towards = views.error / (views.distance + 1e-6) - method.field(x, batch)
    last = (1.0, 0.5)[batch.draws.shared_integer("exit", 2)]
    t = batch.draws.uniform("guidance t", 0.02, min(0.98, last))
    x_t = path.noised(x, batch.draws.normal("guidance eps", SHAPE), t)
    size = (x - method.teacher.predict(x_t, t, batch.cond).x0).abs().flatten(1).mean(1).clamp_min(0.1)
    expected = (SCALE - 1) * (MU - NULL) * t**2 / ((1 - t) ** 2 * S**2 + t**2) / size
    torch.testing.assert_close(towards.flatten(1), expected[:, None].expand(-1, 2), rtol=1e-3, atol=1e-4)


# --- a first step that keeps diversity (card 12) -----------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_clean_prediction_of_a_jump_is_the_inverse_of_the_ddim_step(path):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(8, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    t, s = torch.full((8,), 0.95, dtype=torch.float64), torch.full((8,), 0.3, dtype=torch.float64)
    said = x0_of_jump(path, path.noised(x0, eps, t), t, path.noised(x0, eps, s), s)
    torch.testing.assert_close(said, x0)


def test_the_first_steps_target_is_the_mean_velocity_of_the_teachers_trajectory():
    """u* = (eps - z) / (1 - t) with z on the exact ODE of a Gaussian: (1 - t) mu + sqrt(V_t) eps; a long trajectory
    comes close, and one of a single step asks for the teacher's own prediction."""
    path, batch = FlowPath(), toy_batch(16)
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    last = 0.6
    deviation = math.sqrt((1 - last) ** 2 * S**2 + last**2)
    # x0 = eps - u* = eps - (eps - z) / (1 - t)
    exact = toy_student(Affine(MU, 1 - (1 - deviation) / (1 - last)), path)
    assert float(first_step_loss(exact, teacher, batch, 1.0, 160, 400)) < 1e-5
    assert float(first_step_loss(exact, teacher, batch, 1.0, 12, 30)) < 1e-3
    copy = toy_student(Gaussian(path, MU, S), path)
    assert float(first_step_loss(copy, teacher, batch, 1.0, 1, 30)) < 1e-10
    assert float(first_step_loss(copy, teacher, batch, 1.0, 160, 400)) > 1e-3


def test_the_first_step_learns_from_the_guided_teacher():
    """A trajectory of one step asks for the teacher's own prediction, at pure noise u + g (c - u)."""
    path, batch, null, scale = FlowPath(), toy_batch(16), 0.2, 3.0
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, null, S))
    goal = null + scale * (MU - null)
    for mean, error in ((goal, 0.0), (MU, (goal - MU) ** 2)):
        student = toy_student(Affine(mean, 0.0), path)
        options = DMD.Options(guidance=scale, score_guidance=1.0, first_step_weight=1.0, first_step_calls=1)
        logs = DMD(Copies(teacher, student), (1.0, 0.5), options).match(batch.noise, batch)[1]
        assert float(logs["first_step"].detach()) == pytest.approx(error, rel=1e-4, abs=1e-8)


def test_a_first_step_that_keeps_diversity_keeps_its_noise():
    """On a table DMD2 re-noises between steps; DP-DMD does not, unless it is told to."""
    teacher = ToyTeacher(gaussian_eps(MU, S), TABLE, "eps")
    first = {"first_step_weight": 0.05}
    cases = [({}, True), (first, False), ({**first, "renoise": True}, True), ({"renoise": False}, False)]
    for options, renoise in cases:
        student = toy_student(gaussian_eps(MU, S), TABLE, "eps")
        method = DMD(Copies(teacher, student), (1.0, 0.5), DMD.Options(**options))
        assert method.sampler().renoise is renoise


def test_matching_leaves_the_first_step_to_its_regression():
    """No exit at the first call: the matching's gradient in what that call returns is zero (card 12, test 1)."""
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    options = DMD.Options(first_step_weight=0.05, first_step_calls=2, first_step_grid=8)
    method = DMD(
        Copies(teacher, toy_student(Perceptron(seed=1), path, "velocity")), (1.0, 0.75, 0.5, 0.25), options
    )
    exits = set()
    for step in range(30):
        graphs: list[bool] = []
        hook = method.student.net.register_forward_hook(
            lambda m, a, out, g=graphs: g.append(out.requires_grad)
        )
        x = method.generate(toy_batch(4, step))
        hook.remove()
        exits.add(len(graphs) - 1)
        assert graphs[0] is False and x.requires_grad
    assert exits == {1, 2, 3}
    loss, logs = loss_of(method, "student", toy_batch(4))
    loss.backward()
    assert float(logs["first_step"]) > 0
    with pytest.raises(UserError, match=r"takes two student.times or more from 1.0 on"):
        DMD(Copies(teacher, toy_student(Perceptron(), path, "velocity")), (1.0,), options)
