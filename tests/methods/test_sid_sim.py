"""SiD and SIM against closed forms on Gaussians, and against each other and DMD (cards 5, 6 and the bridge of 0.3)."""

from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.fake_score import Views
from stepdistill.methods.dmd import DMD
from stepdistill.methods.sid import SiD, numerator
from stepdistill.methods.sim import SIM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
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

MU, S = 0.7, 0.8
PATHS = [FlowPath(), TrigPath()]


def method_of(kind, path, shift, scale, **options):
    """A Gaussian teacher, an affine student and a fake network that is exact for it."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = kind(Copies(teacher, toy_student(Affine(shift, scale), path)), (1.0,), kind.Options(**options))
    method.fake.net = Gaussian(path, shift, scale).requires_grad_(False)
    return method


def views_of(method, count=64, step=0):
    batch = toy_batch(count, step)
    return method.views(method.generate(batch), batch)


def many_views(method, time, count=400_000):
    """Views of many samples at one time in float64, cheaper than through a batch's draws, with their graph."""
    path, student = method.student.path, method.student
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.full((count,), time, dtype=torch.float64)
    x = student.net.shift + student.net.scale * z
    x_t = path.noised(x, eps, t)
    real = method.teacher.predict_with_input_gradient(x_t, t, Condition())
    return Views(x, x_t, t, real, method.fake.predict(x_t, t, Condition()))


def variances(path, time, *deviations):
    alpha, sigma = (float(value) for value in path.alpha_sigma(torch.tensor(time)))
    return alpha, sigma, *(alpha**2 * s**2 + sigma**2 for s in deviations)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_its_first_form_plus_a_square(alpha):
    """L_a - L_1 = (1 - a) |x0_real - x0_fake|^2, element by element, and L_1 = (real - fake)(fake - x)."""
    views = views_of(method_of(SiD, FlowPath(), 0.2, 1.1))
    gap = views.real.x0 - views.fake.x0
    torch.testing.assert_close(numerator(views, 1.0), gap * (views.fake.x0 - views.x))
    torch.testing.assert_close(
        numerator(views, alpha) - numerator(views, 1.0), (1 - alpha) * gap.square(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_gradient_and_value_of_a_mean_shift(path, alpha):
    """d/dm = (m - mu) (sigma^2 / V)^2 whatever a is, while the value is (1 - a) ((m - mu) sigma^2 / V)^2."""
    time, shift = 0.6, 0.3
    method = method_of(SiD, path, MU + shift, S)
    loss = numerator(many_views(method, time), alpha).mean()
    loss.backward()
    _, sigma, variance = variances(path, time, S)
    ratio = sigma**2 / variance
    assert float(method.student.net.shift.grad) == pytest.approx(shift * ratio**2, rel=1e-3)
    assert loss.item() == pytest.approx((1 - alpha) * (shift * ratio) ** 2, abs=2e-3)


@pytest.mark.parametrize("kind", [SiD, SIM])
def test_value_and_gradient_are_zero_at_the_optimum(kind):
    """Fake network and teacher equal: zero at every point, not in the mean only."""
    method = method_of(kind, FlowPath(), MU, S)
    loss, logs = loss_of(method, "student", toy_batch(64))
    loss.backward()
    assert not any(value.requires_grad for value in logs.values())
    net = method.student.net
    assert [float(v) for v in (logs["error"], loss.detach(), net.shift.grad, net.scale.grad)] == [0.0] * 4


def test_sid_is_finite_where_the_sample_is_what_the_teacher_sees_in_it():
    """The normaliser |x - x0_real| is 0 then, and so is what it divides: both are of one point."""
    teacher = ToyTeacher(Gaussian(FlowPath(), MU, 0.0), FlowPath())
    method = SiD(Copies(teacher, toy_student(Affine(MU, 0.0), FlowPath())), (1.0,), SiD.Options())
    method.fake.net = Gaussian(FlowPath(), MU, 0.0).requires_grad_(False)
    views = many_views(method, 0.5, count=4)
    assert float(views.distance.detach().abs().max()) < 1e-12
    loss = method.divergence(views)
    loss.backward()
    assert abs(loss.item()) < 1e-12 and float(method.student.net.shift.grad.abs()) < 1e-12


@pytest.mark.parametrize(
    ("kind", "options"), [(SiD, {"alpha": 1.0}), (SiD, {}), (SIM, {}), (SIM, {"distance": "l2"})]
)
def test_detaching_the_input_leaves_the_direction_of_dmd(kind, options):
    """dL/dx = e over SiD's normaliser, e / sqrt(|e|^2 + c^2), or 2 e; attached, it is another gradient."""
    path = FlowPath()
    method, batch = method_of(kind, path, 0.2, 1.1, **options), toy_batch(32)
    x = method.generate(batch).detach().requires_grad_(True)
    attached = method.views(x, batch)
    with torch.no_grad():
        seen = method.views(x, batch)
    detached = Views(x, seen.x_t, seen.t, seen.real, seen.fake)
    ours, other = (
        torch.autograd.grad(method.divergence(v).mean(), x)[0] * len(x) for v in (detached, attached)
    )
    assert not torch.allclose(ours, other, rtol=1e-2, atol=1e-4)
    if kind is SiD:
        dmd = method_of(DMD, path, 0.2, 1.1, guidance=1.0)
        torch.testing.assert_close(ours * x[0].numel(), dmd.field(x, batch).detach(), rtol=1e-4, atol=1e-5)
    elif options:
        torch.testing.assert_close(ours, 2 * seen.error)
    else:
        c = method.options.c * x[0].numel() ** 0.5
        size = (seen.error.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt()
        torch.testing.assert_close(ours, seen.error / size)


@pytest.mark.parametrize("path", PATHS)
def test_l2_sim_is_twice_kappa_squared_times_sid(path):
    """Sample by sample: SIM(L2) = 2 kappa^2 SiD(1), kappa = alpha / sigma^2 with weight score, 1 with weight x0."""
    for weight in ("score", "x0"):
        method = method_of(SIM, path, 0.2, 1.1, distance="l2", weight=weight, score_times=(0.1, 0.9))
        views = views_of(method)
        alpha, sigma = path.alpha_sigma(views.t)
        kappa = alpha / sigma**2 if weight == "score" else torch.ones_like(alpha)
        sid = numerator(views, 1.0).flatten(1).sum(1)
        torch.testing.assert_close(method.divergence(views), 2 * kappa**2 * sid, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_score_projection(path):
    """E[u(x_t) . (score_fake - score(x_t | x))] = 0 for any u when the fake score is exact: what SIM rests on."""
    views = many_views(method_of(SIM, path, 0.2, 1.1), 0.6)
    implicit = (views.fake.x0 - views.x).detach()
    for power in range(4):
        assert float((views.x_t.detach() ** power * implicit).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_sim_is_the_gradient_of_its_divergence(path, distance):
    """The theorem, in mean and deviation: autograd of E_pi d(score_student - score_teacher) through the student's own
    closed-form score, pi held fixed. Stopping the denominator's gradient breaks it."""
    time, c = 0.5, 0.3
    options = {"distance": distance, "weight": "score", "c": c}
    method = method_of(SIM, path, MU - 0.4, 1.2, **options)
    views = many_views(method, time)
    net = method.student.net
    ours = torch.autograd.grad(method.divergence(views).mean(), [net.shift, net.scale], retain_graph=True)

    alpha, sigma, real = variances(path, time, S)
    m, k = (value.detach().double().requires_grad_(True) for value in (net.shift, net.scale))
    x_t = views.x_t.detach()
    y = -(x_t - alpha * m) / (alpha**2 * k**2 + sigma**2) + (x_t - alpha * MU) / real
    square = y.flatten(1).square().sum(1)
    divergence = square if distance == "l2" else (square + 2 * c**2).sqrt() - 2**0.5 * c
    exact = torch.autograd.grad(divergence.mean(), [m, k])
    for one, other in zip(ours, exact, strict=True):
        assert float(one) == pytest.approx(float(other), rel=0.02, abs=0.01)

    if distance == "huber":
        stopped = method_of(SIM, path, MU - 0.4, 1.2, **options, stop_denominator=True)
        short = torch.autograd.grad(stopped.divergence(views).mean(), [net.shift, net.scale])
        assert abs(float(short[1] - exact[1])) > 0.1 * abs(float(exact[1]))


@pytest.mark.parametrize("path", PATHS)
def test_sim_gradients_of_a_mean_shift(path):
    """With y = alpha (m - mu) / V in each of D elements: L2 gives 2 D y alpha / V, Huber D y / |(y, c)| alpha / V; for
    small c that is independent of the shift's size, for large c it is the L2 gradient over 2 c."""
    time, size = 0.6, 2
    alpha, _, variance = variances(path, time, S)

    def gradient(shift, **options):
        method = method_of(SIM, path, MU + shift, S, weight="score", **options)
        method.divergence(many_views(method, time, 1000)).mean().backward()
        return float(method.student.net.shift.grad)

    y = alpha * 0.3 / variance
    assert gradient(0.3, distance="l2") == pytest.approx(2 * size * y * alpha / variance, rel=1e-4)
    norm = (size * (y**2 + 0.5**2)) ** 0.5
    assert gradient(0.3, c=0.5) == pytest.approx(size * y / norm * alpha / variance, rel=1e-4)
    assert gradient(0.3, c=1e-6) == pytest.approx(gradient(0.03, c=1e-6), rel=1e-3)
    large = 1e3
    assert 2 * large * size**0.5 * gradient(0.3, c=large) == pytest.approx(
        gradient(0.3, distance="l2"), rel=1e-3
    )


@pytest.mark.parametrize("kind", [SiD, SIM])
def test_guidance_moves_the_fixed_point_as_it_moves_the_teacher(kind):
    """Conditional N(c, s), unconditional N(u, s): the guided denoiser is that of mean u + g (c - u), with its graph."""
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=Gaussian(path, 0.2, S))
    goal = 0.2 + 2.5 * (MU - 0.2)
    method = kind(Copies(teacher, toy_student(Affine(goal, S), path)), (1.0,), kind.Options(guidance=2.5))
    method.fake.net = Gaussian(path, goal, S).requires_grad_(False)
    views = views_of(method)
    assert views.real.x0.requires_grad
    assert float(views.error.abs().max()) < 1e-5


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_pipelines_prediction_has_a_graph_to_its_input_alone(teacher_of, guidance):
    """Same numbers as predict, a derivative that a finite difference confirms, and no gradient for any weight."""
    teacher = teacher_of("sd")
    cond = teacher.codec.encode(["a red cat", "a dog"])
    generator = torch.Generator().manual_seed(0)
    x_t, direction, u = (torch.randn(2, *teacher.codec.shape, generator=generator) for _ in range(3))
    t = torch.tensor([0.3, 0.7])
    x_t.requires_grad_(True)
    prediction = teacher.predict_with_input_gradient(x_t, t, cond, guidance=guidance)
    plain = teacher.predict(x_t, t, cond, guidance=guidance)
    assert torch.equal(prediction.x0, plain.x0) and torch.equal(prediction.eps, plain.eps)
    assert not plain.x0.requires_grad
    (gradient,) = torch.autograd.grad((prediction.x0 * u).sum(), x_t)
    step = 1e-2
    ends = [teacher.predict(x_t + h * direction, t, cond, guidance=guidance).x0 for h in (step, -step)]
    slope = ((ends[0] - ends[1]) * u).sum() / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-2, abs=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.net.parameters())


class Sealed(Batch):
    """A batch whose images and pairs raise."""

    def __getattribute__(self, name):
        if name in ("images", "pairs"):
            raise AssertionError(f"a data-free method asked for {name}")
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", [SiD, SIM])
def test_is_data_free_and_leaves_the_frozen_networks_alone(kind):
    """Noise and prompts alone, in both turns; only the network whose turn it is gets a gradient."""
    assert kind.Options().needs == {"noise", "prompts"}
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), path, "velocity")
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(guidance=2.0))
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    for turn, parameters in trained.items():
        clear(method)
        take_turn(trained, turn)
        plain = toy_batch(8)
        loss_of(method, turn, Sealed(plain.draws, plain.shape, plain.cond, plain.prompt))[0].backward()
        assert all(p.grad is not None for p in parameters)
        others = [p for name, group in trained.items() if name != turn for p in group]
        assert all(p.grad is None for p in [*others, *teacher.denoiser.net.parameters()])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SiD, {}), (SIM, {}), (SIM, {"distance": "l2"}), (SIM, {"stop_denominator": True})],
)
def test_training_brings_a_gaussian_student_home(kind, options):
    """Alternating updates at a falling rate, the fake network learning too: the mean closes nine tenths of its gap, the
    deviation four fifths. Of three seeds the worst leaves 0.05 and 0.08."""
    method = method_of(kind, FlowPath(), -0.5, 0.3, **options)
    networks = modules_of(method)
    trained = {name: list(net.parameters()) for name, net in networks.items()}
    optimizers = {k: torch.optim.Adam(p, betas=(0.5, 0.9)) for k, p in trained.items()}
    for step in range(600):
        turn = method.turn(step).network
        take_turn(trained, turn)
        optimizers[turn].param_groups[0]["lr"] = 0.03 * (1 - step / 600)
        optimizers[turn].zero_grad()
        loss_of(method, turn, toy_batch(128, step))[0].backward()
        optimizers[turn].step()
    assert method.student.net.shift.item() == pytest.approx(MU, abs=0.12)
    assert abs(method.student.net.scale.item()) == pytest.approx(S, abs=0.1)
