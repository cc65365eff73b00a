"""f-distill: its weights from the divergences, its gradient in closed form, and DMD as its special case (card 4)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.methods.dmd import DMD
from stepdistill.methods.f_distill import BINS, WEIGHTS, FDistill, RatioWeight
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
from stepdistill.training.parallel import take_turn

MU, S = 0.7, 0.8
PATH = FlowPath()
DIVERGENCES = {
    "reverse_kl": (lambda r: -r.log(), 1),
    "forward_kl": (lambda r: r * r.log(), 1),
    "js": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), 1),
    "softened_reverse_kl": (lambda r: (1 + r) * ((1 + r) / (2 * r)).log(), 1),
    "hellinger": (lambda r: 1 - r.sqrt(), 1 / 4),
    "neyman": (lambda r: 1 / r, 2),
    "jeffreys": (lambda r: (r - 1) * r.log(), 1),
}
"""f of each divergence, and the constant that its h leaves out."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_is_r_squared_times_the_second_derivative(name):
    f, constant = DIVERGENCES[name]
    r = torch.logspace(-2, 1.5, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(constant * WEIGHTS[name](r.detach()), (r**2 * second).detach())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_scores_are_the_gradient_of_the_divergence(name):
    """For Gaussians at one noise level, in mean and deviation: E_q[-h alpha z' (score_p - score_q)] = dD_f."""
    f, constant = DIVERGENCES[name]
    alpha, sigma, m, k = 0.6, 0.4, MU - 0.3, 0.9
    x = torch.linspace(-8, 9, 40_001, dtype=torch.float64)

    def log_density(mean, deviation):
        variance = alpha**2 * deviation**2 + sigma**2
        return -((x - alpha * mean) ** 2) / (2 * variance) - 0.5 * (2 * torch.pi * variance).log()

    mean, deviation = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, k))
    p, q = log_density(MU, torch.tensor(S, dtype=torch.float64)), log_density(mean, deviation)
    exact = torch.autograd.grad(torch.trapezoid(q.exp() * f((p - q).exp()), x), [mean, deviation])

    q, variance_p, variance_q = q.detach(), alpha**2 * S**2 + sigma**2, alpha**2 * k**2 + sigma**2
    scores = -(x - alpha * MU) / variance_p + (x - alpha * m) / variance_q
    field = -q.exp() * constant * WEIGHTS[name]((p - q).exp()) * alpha * scores
    z = alpha * k * (x - alpha * m) / variance_q  # E[z | x_t], for x_t = alpha (m + k z) + sigma eps
    for factor, value in zip((torch.ones_like(x), z), exact, strict=True):
        assert float(torch.trapezoid(field * factor, x)) == pytest.approx(float(value), rel=1e-4)


def perceptrons(kind, **options):
    """A method between perceptrons, with the same weights at every call."""
    teacher = ToyTeacher(Perceptron(), PATH, "velocity", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(**options))
    with torch.no_grad():
        for parameter in method.fake.net.parameters():
            parameter *= 1.1
    return method


def full_batch(count=16, step=5):
    images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))
    return toy_batch(count, step, images=images)


@pytest.mark.parametrize("turn", ["student", "fake"])
def test_the_reverse_kl_is_dmd_with_a_gan(turn):
    """h = 1: loss and gradients equal DMD's bit for bit, also after updates of the running means."""
    ours = perceptrons(FDistill, divergence="reverse_kl", adversarial_weight=0.1)
    dmd = perceptrons(DMD, adversarial_weight=0.1)
    for step in range(3):
        batch = full_batch(step=step)
        one, other = loss_of(ours, turn, batch)[0], loss_of(dmd, turn, batch)[0]
        assert torch.equal(one, other)
        gradients = (
            torch.autograd.grad(loss, list(modules_of(m)[turn].parameters()))
            for m, loss in ((ours, one), (dmd, other))
        )
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        ours.after_step(ours.turn(step))


class Planted(nn.Module):
    """A head that gives each sample of a batch the logit it is told to."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, features):
        return self.logits


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_samples_field_is_dmds_times_its_own_weight(name):
    """With planted logits, at the start of the running means: h(r) / h(1), r = exp(logit) within its range."""
    logits = torch.linspace(-4.0, 4.0, 16)
    ours, dmd = perceptrons(FDistill, divergence=name, ratio_range=(0.2, 9.0)), perceptrons(DMD)
    ours.gan.head = Planted(logits)
    batch = full_batch()
    x = ours.generate(batch).detach().requires_grad_(True)
    loss, logs = ours.match(x, batch)
    (gradient,) = torch.autograd.grad(loss, x)
    h = WEIGHTS[name]
    weight = h(logits.exp().clamp(0.2, 9.0)) / h(torch.ones(1))
    expected = weight.view(-1, 1, 1, 1) * dmd.field(x.detach(), batch).detach()
    torch.testing.assert_close(gradient * x.numel(), expected)
    assert float(logs["weight_std"]) == pytest.approx(float(weight.std(correction=0)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_ratio_of_one_weighs_nothing(name):
    """Logits of zero: every sample has weight 1, before and after an update."""
    weight = RatioWeight(FDistill.Options(divergence=name))
    t = torch.linspace(0.02, 0.98, 64)
    for _ in range(3):
        torch.testing.assert_close(weight(torch.zeros(64), t), torch.ones(64))
        weight.update()


def test_ratios_have_mean_one_in_each_bin_and_weights_over_all():
    """Without memory, the means of one step normalise the same logits exactly: r in each bin, h over all."""
    for divergence in ("forward_kl", "js"):
        weight = RatioWeight(FDistill.Options(divergence=divergence, ratio_ema=0.0))
        generator = torch.Generator().manual_seed(0)
        logit, t = torch.randn(500, generator=generator), torch.linspace(0.02, 0.97, 500)
        first = weight(logit, t)
        for _ in range(2):  # the first fits the means of r, the second that of h to them
            weight.update()
            again = weight(logit, t)
        assert float(again.mean()) == pytest.approx(1.0, abs=1e-5)
        assert not torch.allclose(first, again)
        bins = ((t - 0.02) / 0.96 * BINS).long()
        if divergence == "forward_kl":
            for index in range(BINS):
                assert float(again[bins == index].mean()) == pytest.approx(1.0, abs=1e-5)


def test_means_follow_by_their_decay_and_stay_where_nothing_was_seen():
    """One ratio of 3 in one bin, 2 and 4 in another: both means, and that of h, go a tenth of the way from 1 to 3."""
    weight = RatioWeight(FDistill.Options(divergence="forward_kl", ratio_ema=0.9))
    t = torch.tensor([0.34, 0.75, 0.75])
    weight(torch.tensor([3.0, 2.0, 4.0]).log(), t)
    weight.update()
    expected = torch.ones(BINS)
    expected[3] = expected[7] = 1.2
    torch.testing.assert_close(weight.mean_ratio, expected)
    torch.testing.assert_close(weight.mean_weight, torch.tensor([1.2]))


def test_logits_without_end_weigh_as_the_bounds_of_the_ratio():
    weight = RatioWeight(FDistill.Options(divergence="forward_kl", ratio_range=(0.1, 20.0)))
    seen = weight(torch.tensor([-1e4, 1e4]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(seen, torch.tensor([0.1, 20.0]))


def test_a_student_step_moves_the_means():
    method = perceptrons(FDistill, divergence="forward_kl")
    method.gan.head = Planted(torch.full((16,), 2.0))
    batch = full_batch()
    method.match(method.generate(batch), batch)
    method.after_step(method.turn(0))
    assert float(method.weight.mean_weight) > 1.5


def test_two_parts_of_a_step_are_seen_as_one():
    """Accumulation: the means after two halves are those after the whole; a step without a student turn keeps them."""
    whole, halves = (RatioWeight(FDistill.Options()) for _ in range(2))
    logit, t = torch.linspace(-3, 3, 64), torch.linspace(0.02, 0.98, 64).flip(0)
    whole(logit, t)
    for rows in (slice(0, 32), slice(32, 64)):
        halves(logit[rows], t[rows])
    for weight in (whole, halves, whole):
        weight.update()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, halves.state_dict()[name])
    assert set(whole.state_dict()) == {"mean_ratio", "mean_weight"}


def test_weights_point_the_right_way():
    """Where data has more mass than the student (a high logit) the forward KL weighs more, Neyman's chi^2 less."""
    logit, t = torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])
    low, high = RatioWeight(FDistill.Options(divergence="forward_kl"))(logit, t)
    assert low < 1 < high
    low, high = RatioWeight(FDistill.Options(divergence="neyman"))(logit, t)
    assert low > 1 > high


class Watched(Gaussian):
    """A Gaussian's denoiser with an inner layer for the discriminator to read."""

    def __init__(self, path, mean, deviation):
        super().__init__(path, mean, deviation)
        self.inner = nn.Sequential(nn.Conv2d(SHAPE[0], 32, 1), nn.Tanh())

    def forward(self, x, t, cond):
        self.inner(x)
        return super().forward(x, t, cond)


def gaussian_method(**options):
    """A Gaussian teacher, and a student and a discriminator that are to learn."""
    torch.manual_seed(0)  # of the inner layer
    teacher = ToyTeacher(Watched(PATH, MU, S), PATH)
    return FDistill(
        Copies(teacher, toy_student(Affine(-0.5, 0.3), PATH)), (1.0,), FDistill.Options(**options)
    )


def test_the_logit_learns_the_density_ratio():
    """Of a student that stands still, against log p_data(x_t) / p_student(x_t) in closed form at t = 0.7."""
    method = gaussian_method(discriminator_weight=1.0)
    parameters = list(modules_of(method)["fake"].parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(1)
    for step in range(250):
        images = MU + S * torch.randn(64, *SHAPE, generator=generator)
        optimizer.zero_grad()
        loss_of(method, "fake", toy_batch(64, step, images=images))[0].backward()
        optimizer.step()
    t = torch.full((2000,), 0.7)
    alpha, sigma = 0.3, 0.7
    x_t = alpha * (-0.5 + 0.3 * torch.randn(2000, *SHAPE, generator=generator))
    x_t = x_t + sigma * torch.randn(x_t.shape, generator=generator)

    def log_density(mean, deviation):
        variance = alpha**2 * deviation**2 + sigma**2
        each = -((x_t - alpha * mean) ** 2) / (2 * variance) - 0.5 * torch.tensor(variance).log()
        return each.flatten(1).sum(1)

    exact = log_density(MU, S) - log_density(-0.5, 0.3)
    with torch.no_grad():
        read = method.gan.logits(x_t, t, toy_batch(1).cond)
    assert float(torch.corrcoef(torch.stack([read, exact]))[0, 1]) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["js", "forward_kl"])
def test_training_brings_a_gaussian_student_home(divergence):
    """All networks learning, the ratio from the discriminator: mean and deviation close more than half their gaps."""
    method = gaussian_method(divergence=divergence, fake_updates=2, discriminator_weight=1.0)
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    optimizers = {k: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9)) for k, p in trained.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(450):
        turn = method.turn(step).network
        take_turn(trained, turn)
        optimizers[turn].zero_grad()
        images = MU + S * torch.randn(32, *SHAPE, generator=generator)
        loss_of(method, turn, toy_batch(32, step, images=images))[0].backward()
        optimizers[turn].step()
        method.after_step(method.turn(step))
    assert float(method.weight.mean_ratio.sub(1).abs().max()) > 1e-3
    assert method.student.net.shift.item() == pytest.approx(MU, abs=0.2)
    assert abs(method.student.net.scale.item()) == pytest.approx(S, abs=0.15)


def test_asks_for_images():
    assert FDistill.Options().needs == {"noise", "prompts", "images"}
