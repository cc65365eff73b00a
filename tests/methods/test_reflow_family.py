"""rf++, InstaFlow and SlimFlow against closed forms (cards 8.1 to 8.4), and each of them learning a mixture in 2-D."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from reflow_toy import MU, S, Slimmable, Straight
from torch import nn

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import EDMPath, FlowPath, TablePath, TrigPath, per_sample
from stepdistill.diffusion.solvers import solve, uniform_times
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.distances import distance
from stepdistill.losses.reflow import flow_end
from stepdistill.methods.instaflow import InstaFlow
from stepdistill.methods.rfpp import RFPP, u_shaped
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    Mixture,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

PATHS = [FlowPath(), TrigPath()]
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def table_path():
    """Stable Diffusion's."""
    return TablePath.from_alphas_cumprod(ALPHAS)


def build(kind, net, path=STRAIGHT, times=(1.0,), output="x0", **options):
    """A method with a Gaussian teacher."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    return kind(Copies(teacher, toy_student(net, path, output)), times, kind.Options(**options))


def pair_batch(count=256, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


def value(method, batch):
    with torch.no_grad():
        return float(loss_of(method, "student", batch)[0])


# rf++


def test_times_have_the_density_of_the_card():
    """a cosh(a (t - 1/2)) / (2 sinh(a/2)): integrated over 20 bins, 2e6 draws agree to 1.5 %, and are symmetric."""
    a, bins = 4.0, 20
    generator = torch.Generator().manual_seed(0)
    t = u_shaped(*torch.rand(2, 2_000_000, generator=generator, dtype=torch.float64), a)
    assert float(t.min()) >= 0 and float(t.max()) <= 1
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    integral = torch.sinh(a * (edges - 0.5)) / (
        2 * math.sinh(a / 2)
    )  # the distribution function, less a constant
    assert float(integral[-1] - integral[0]) == pytest.approx(1)
    share = torch.histc(t, bins, 0, 1) / len(t)
    torch.testing.assert_close(share, integral.diff(), rtol=0.015, atol=0)
    torch.testing.assert_close(share, share.flip(0), rtol=0.015, atol=0)
    assert float(share[0] / share[bins // 2]) > 3  # cosh(2) = 3.76 at the very ends


def test_pseudo_huber_is_the_papers():
    """(sqrt(|e|^2 + c^2) - c) / d with c = 0.00054 d: |e|^2 / (2 c d) for small e, |e| / d for large."""
    zero, d = torch.zeros(3, 4, 5, 5), 100
    c = 0.00054 * d
    small, large = torch.full_like(zero, 1e-6), torch.full_like(zero, 1e3)
    assert float(distance(small.double(), zero.double(), "huber")) == pytest.approx(
        1e-12 * d / (2 * c * d), rel=1e-3
    )
    assert float(distance(large, zero, "huber")) == pytest.approx(1e3 * 10 / d, rel=1e-4)
    weight = torch.tensor([0.0, 1.0, 2.0])
    for name in ("l2", "l1", "huber"):
        each = torch.stack([distance(large[i : i + 1], zero[:1], name) for i in range(3)])
        torch.testing.assert_close(distance(large, zero, name, weight), (weight * each).mean())


@pytest.mark.parametrize("path", PATHS)
def test_rfpp_loss_is_zero_at_the_straight_velocity(path):
    """The root of a squared round-off over t = 1e-3 is what is left; a wrong network is far above it."""
    assert value(build(RFPP, Straight(path), path), pair_batch()) < 1e-4
    assert value(build(RFPP, Gaussian(path, MU, S), path), pair_batch()) > 0.05


def test_rfpp_loss_is_the_formula():
    """A clean prediction off by e is a velocity off by e / t: (1 - t) rho(e / t) + rho(e) / t, by hand."""
    error, batch = 0.3, pair_batch()
    method = build(RFPP, Straight(STRAIGHT, error))
    t = method.times_of(batch)
    assert float(t.min()) >= 1e-3 and float(t.max()) <= 1
    c = 0.00054 * 2

    def rho(e):
        return ((2 * e**2 + c**2) ** 0.5 - c) / 2

    expected = (1 - t) * rho(error / t) + rho(error * torch.ones_like(t)) / t
    assert value(method, batch) == pytest.approx(float(expected.mean()), rel=1e-3)
    plain = build(RFPP, Straight(STRAIGHT, error), clean_over_t=False, clean_weight=0.5)
    expected = (1 - t) * rho(error / t) + 0.5 * rho(error)
    assert value(plain, batch) == pytest.approx(float(expected.mean()), rel=1e-3)


def test_a_variance_preserving_teacher_starts_with_its_own_velocity():
    """v = eps - x0 at t = sqrt(1 - A) / (sqrt A + sqrt(1 - A)), x_flow = x_vp / (sqrt A + sqrt(1 - A)) (card 2.1)."""
    alphas_cumprod, path = ALPHAS, table_path()
    student = toy_student(Perceptron(), path, "eps")
    index = torch.tensor([20, 250, 600, 999])
    root, noise = alphas_cumprod[index].sqrt().float(), (1 - alphas_cumprod[index]).sqrt().float()
    x_vp = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    eps = student.raw(x_vp, (index + 1) / 1000, Condition())
    x0 = (x_vp - per_sample(noise, eps) * eps) / per_sample(root, eps)
    x_flow = x_vp / per_sample(root + noise, x_vp)
    said = student.predict_on(STRAIGHT, x_flow, noise / (root + noise), Condition())
    torch.testing.assert_close(said.velocity, eps - x0, rtol=2e-3, atol=2e-3)


def test_an_edm_teacher_starts_with_its_own_velocity():
    """Read on the straight path, D = c_skip x + c_out F gives the closed form without a division by t (card 2.1)."""
    deviation, path = 0.5, EDMPath(80.0)

    def inner(x, noise):  # F, any function of its scaled input and c_noise
        return torch.tanh(x + per_sample(noise, x))

    class EDM(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.tensor(0.0))  # networks have a dtype

        def forward(self, x, t, cond):
            sigma = path.alpha_sigma(t)[1]
            total = (sigma**2 + deviation**2).sqrt()
            skip, out = deviation**2 / total**2, sigma * deviation / total
            scaled = x / per_sample(total, x)
            return per_sample(skip, x) * x + per_sample(out, x) * inner(scaled, sigma.log() / 4)

    student = toy_student(EDM(), path)
    t = torch.tensor([0.01, 0.3, 0.8, 0.98])
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    root = per_sample((t**2 + deviation**2 * (1 - t) ** 2).sqrt(), x)
    first = per_sample(t - deviation**2 * (1 - t), x) / root**2
    closed = first * x - deviation / root * inner(x / root, (t / (1 - t)).log() / 4)
    said = student.predict_on(STRAIGHT, x, t, Condition()).velocity
    torch.testing.assert_close(said, closed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_papers_sampler_and_eulers_agree_on_a_straight_flow(steps):
    """x' = (1 - t') x0 + t' z with the first noise z kept: on lines that do not cross both stay on the line."""
    student = toy_student(Straight(STRAIGHT), STRAIGHT)
    z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    kept = Sampler(uniform_times(steps), renoise=True).draw(student, z, Condition(), lambda call: z)
    euler = Sampler(uniform_times(steps), renoise=False).draw(student, z, Condition(), lambda call: z)
    torch.testing.assert_close(kept, euler, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(euler, MU + S * z, atol=1e-5, rtol=1e-5)


def test_rfpp_compares_features_of_the_frozen_teacher():
    """At the exact flow their distance is zero too; the gradient passes through the teacher and stays out of it."""
    teacher = ToyTeacher(Perceptron(seed=5), STRAIGHT, "velocity")
    for net, low, high in ((Straight(STRAIGHT), 0.0, 1e-9), (Straight(STRAIGHT, 0.3), 1e-3, 1.0)):
        method = RFPP(Copies(teacher, toy_student(net, STRAIGHT)), (1.0,), RFPP.Options(clean="features"))
        clean = loss_of(method, "student", pair_batch())[1]["clean"]
        clean.backward()
        assert low <= float(clean.detach()) < high
        assert (abs(float(net.error.grad)) < 1e-6) == (low == 0)  # round-off, or a slope
        assert all(p.grad is None for p in teacher.denoiser.net.parameters())


# InstaFlow


def test_instaflow_goes_through_its_rounds_and_stages():
    method = build(InstaFlow, Straight(STRAIGHT), rounds=2, reflow_updates=3, l2_updates=2, flow_steps=2)
    assert [method.stage(step) for step in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [method.phase(step) for step in (2, 3, 5, 6, 7, 8)] == [
        *("reflow 1", "reflow 2", "reflow 2"),
        *("squared distillation", "squared distillation", "distillation"),
    ]
    rates = [method.lr_ratio(method.turn(step)) for step in range(8)]
    assert rates == pytest.approx([1, 0.75, 0.25, 1, 0.75, 0.25, 1, 1])  # annealed within each round
    once = build(InstaFlow, Straight(STRAIGHT), reflow_updates=3, l2_updates=2, distance="l2")
    assert [once.phase(step) for step in (2, 3, 5)] == ["reflow", "distillation", "distillation"]
    seen = []
    for step in range(10):
        logs = loss_of(method, "student", pair_batch(16, step))[1]
        seen.append(next(iter(logs)))
        with torch.no_grad():
            method.student.net.error.fill_(0.1 * (step + 1))
        method.after_step(method.turn(step))
        last = 0.0 if step < 2 else 0.3 if step < 5 else 0.6  # the flow is the student at the end of a round
        assert float(method.flow.net.error) == pytest.approx(last)
    assert seen == ["reflow"] * 6 + ["distillation"] * 4
    # Off by e = 1 per element: the squared distance is 1, the pseudo-Huber one (sqrt(2 + c^2) - c) / 2.
    with torch.no_grad():
        method.flow.net.error.fill_(0.0)
        method.student.net.error.fill_(1.0)
    assert value(method, pair_batch(16, 7)) == pytest.approx(1.0, rel=1e-4)
    assert value(method, pair_batch(16, 8)) == pytest.approx(
        ((2 + 0.00108**2) ** 0.5 - 0.00108) / 2, rel=1e-4
    )


@pytest.mark.parametrize("path", PATHS)
def test_instaflow_loss_is_zero_at_the_straight_flow_in_every_stage(path):
    """The reflowed Gaussian is a fixed point of reflow: its own pairs are those it was made from."""
    method = build(InstaFlow, Straight(path), path, rounds=3, reflow_updates=1, l2_updates=1, flow_steps=4)
    for step in range(5):
        assert value(method, pair_batch(64, step)) < 1e-9


def test_the_first_round_alone_reads_the_teachers_samples():
    method = build(InstaFlow, Straight(STRAIGHT), rounds=2, reflow_updates=1, flow_steps=2)
    exact, other = (toy_batch(16, pairs=lambda z, by=by: MU + by + S * z) for by in (0.0, 1.0))
    assert value(method, exact) < 1e-9 < 0.1 < value(method, other)
    for step in (1, 2):
        assert value(method, toy_batch(16, step)) < 1e-9  # no pairs are given, and none is asked for


def test_further_rounds_learn_from_the_flows_own_pairs():
    """With a flow that is off by e, the pairs of round two are its Euler ends, not the teacher's samples."""
    method = build(InstaFlow, Straight(STRAIGHT), rounds=2, reflow_updates=1, flow_steps=5)
    with torch.no_grad():
        method.student.net.error.fill_(0.2)
    method.after_step(method.turn(0))
    batch = pair_batch(64, 1)
    z, x, _ = method.coupling(batch, own=True)
    assert torch.equal(z, batch.noise)
    torch.testing.assert_close(x, flow_end(method.flow, batch.noise, Condition(), 5))
    assert float((x - (MU + S * z)).abs().min()) > 0.1
    teacher = method.coupling(batch, own=False)
    assert torch.equal(teacher[0], batch.pairs.noise) and torch.equal(teacher[1], batch.pairs.x0)


def test_a_straight_flow_ends_at_the_same_place_in_any_number_of_steps():
    z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    straight, curved = (toy_student(net, STRAIGHT) for net in (Straight(STRAIGHT), Gaussian(STRAIGHT, MU, S)))
    for steps in (1, 2, 9):
        torch.testing.assert_close(
            flow_end(straight, z, Condition(), steps), MU + S * z, atol=1e-5, rtol=1e-5
        )
    # The teacher's flow is curved: its one step is the mean, and Euler steps approach mu + s z with first order.
    torch.testing.assert_close(flow_end(curved, z, Condition(), 1), torch.full_like(z, MU))
    errors = [
        float((flow_end(curved, z, Condition(), n) - (MU + S * z)).square().mean().sqrt()) for n in (64, 128)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


# SlimFlow


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_annealing_keeps_the_noise_standard_and_lets_its_pair_in(schedule):
    """b goes from 1 to 0 over the share; z' has variance (1 - b^2) + b^2 = 1, covariance sqrt(1 - b^2) with z."""
    method = build(SlimFlow, Straight(STRAIGHT), reflow_updates=1000, anneal=0.6, anneal_schedule=schedule)
    betas = [method.beta(step) for step in range(0, 1000, 50)]
    assert betas[0] == 1 and betas[12] == pytest.approx(0, abs=1e-12) and betas == sorted(betas, reverse=True)
    assert method.beta(300) == pytest.approx(0.5)
    z = torch.randn(20_000, *SHAPE, generator=torch.Generator().manual_seed(0))
    for step in (0, 150, 450, 700):
        draws = Draws(0, step, 0, len(z))
        noise = method.annealed_noise(z, Batch(draws, SHAPE, Condition(), torch.zeros(len(z))), draws.step)
        assert float(noise.mean()) == pytest.approx(0, abs=0.02)
        assert float(noise.var()) == pytest.approx(1, abs=0.03)
        expected = (1 - method.beta(step) ** 2) ** 0.5
        assert float((noise * z).mean()) == pytest.approx(expected, abs=0.03)


def test_annealing_goes_from_flow_matching_to_reflow():
    """At b = 1 the coupling is independent, its minimiser the teacher's curved flow; at b = 0 the straight one's loss
    is zero. In between the best affine-in-x velocity has a loss in between."""
    losses = {}
    for name in ("curved", "straight"):
        net = Gaussian(STRAIGHT, MU, S) if name == "curved" else Straight(STRAIGHT)
        method = build(SlimFlow, net, reflow_updates=1000)
        losses[name] = [value(method, pair_batch(2000, step)) for step in (0, 999)]
        if name == "curved":  # the gradient at b = 1 vanishes in the mean: this is the minimiser
            slope = [
                torch.autograd.grad(
                    loss_of(method, "student", toy_batch(2000, 0, seed, lambda z: MU + S * z))[0],
                    (net.mean, net.deviation),
                )
                for seed in range(4)
            ]
            loss = losses[name][0]
            for part in zip(*slope, strict=True):
                assert abs(float(torch.stack(part).mean())) < 0.15 * loss
    assert losses["curved"][0] < losses["straight"][0]
    assert losses["straight"][1] < 1e-8 < 0.01 < losses["curved"][1]


@pytest.mark.parametrize("path", PATHS)
def test_flow_guided_target_is_the_exact_sample_of_a_straight_flow(path):
    """With a straight frozen flow and the exact student, y = mu + s xi: both terms of the distillation vanish."""
    method = build(SlimFlow, Straight(path), path, reflow_updates=0)
    logs = loss_of(method, "student", pair_batch())[1]
    assert logs["distillation"].item() < 1e-10
    assert logs["guide"].item() < 1e-10


def test_flow_guided_target_by_hand():
    """A student off by e is at x_m = m xi + (1 - m)(mu + s xi + e); the flow reads z back from it and lands on y."""
    error, batch = 0.5, pair_batch(64)
    method = build(SlimFlow, Straight(STRAIGHT), reflow_updates=0)
    with torch.no_grad():
        method.student.net.error.fill_(error)
    m = batch.draws.uniform("guide time", 0.2, 0.8)
    assert float(m.min()) > 0.2 and float(m.max()) < 0.8
    m = per_sample(m, batch.noise)
    x = MU + S * batch.noise + error
    # x_m = xi + (m - 1) v with v = xi - x, and y = x_m - m F(x_m, m), F = z - (mu + s z) on the line through x_m.
    state = batch.noise + (m - 1) * (batch.noise - x)
    z = (state - (1 - m) * MU) / ((1 - m) * S + m)
    y = state - m * (z - (MU + S * z))
    loss = method.guide(batch)
    assert loss.item() == pytest.approx(float((x - y).square().mean()), rel=1e-4)
    # The gradient goes through the student's clean prediction alone: the target is held fixed.
    (slope,) = torch.autograd.grad(loss, method.student.net.error)
    assert float(slope) == pytest.approx(float(2 * (x - y).mean()), rel=1e-4)
    assert float(slope) > 0


def test_slimflow_begins_its_distillation_with_the_annealed_flow():
    method = build(SlimFlow, Straight(STRAIGHT), reflow_updates=2)
    with torch.no_grad():
        method.student.net.error.fill_(0.3)
    method.after_step(method.turn(0))
    assert float(method.flow.net.error) == 0
    assert "reflow" in loss_of(method, "student", pair_batch(8, 1))[1]
    method.after_step(method.turn(1))
    assert float(method.flow.net.error) == pytest.approx(0.3)
    assert set(loss_of(method, "student", pair_batch(8, 2))[1]) == {"distillation", "guide"}
    assert [method.phase(step) for step in (1, 2)] == ["reflow", "distillation"]


def test_slimflow_swaps_in_the_familys_smaller_network():
    teacher, student = ToyTeacher(Perceptron(), STRAIGHT, "velocity"), toy_student(Perceptron(), STRAIGHT)
    student.family = Slimmable()
    method = SlimFlow(Copies(teacher, student), (1.0,), SlimFlow.Options(width=0.25))
    assert SlimFlow.own_network  # so that nothing is done to the teacher's for it
    assert modules_of(method)["student"].first.out_features == 16
    assert method.flow.net.first.out_features == 16
    assert teacher.denoiser.net.first.out_features == 64
    assert (
        method.options.judged_from == method.options.reflow_updates
    )  # a new network's samples say nothing before
    assert SlimFlow.Options().judged_from == 0
    for share in (0.0, 1.5):
        with pytest.raises(ValueError):
            SlimFlow.Options(width=share)


# All of them


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (RFPP, {"clean": "features"}, (0,)),
        (InstaFlow, {"rounds": 2, "reflow_updates": 2, "l2_updates": 2, "own": 0.5}, (1, 2, 4, 5, 6, 7, 8)),
        (SlimFlow, {"reflow_updates": 2}, (1, 2)),
    ],
)
def test_in_every_stage_a_batch_is_its_two_halves(kind, options, steps):
    teacher = ToyTeacher(Perceptron(), STRAIGHT, "velocity")
    student = toy_student(Perceptron(seed=1), STRAIGHT, "velocity")
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(**options))
    for step in steps:
        whole = loss_of(method, "student", pair_batch(16, step))[0]
        halves = [loss_of(method, "student", part)[0] for part in pair_batch(16, step).split(2)]
        torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-6)


# Learning


@cache
def mixture_pairs(count=4096):
    """Noise and where the exact flow of a 2-D mixture takes it."""
    net = Mixture(STRAIGHT)
    z = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))

    def predict(x, t):
        return STRAIGHT.read(net(x, t, Condition()), "x0", x, t)

    x = solve(predict, z, (*uniform_times(24), 0.0), "heun")
    return z, x


def mixture_batch(step, count=64):
    z, x = mixture_pairs()
    draws = Draws(0, step, 0, count)
    rows = torch.randint(len(z) // 2, (count,), generator=torch.Generator().manual_seed(step))
    return Batch(draws, SHAPE, Condition(), torch.zeros(count), pairs=Examples(x[rows], Condition(), z[rows]))


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|: zero for one law alone."""
    a, b = a.flatten(1), b.flatten(1)
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


LEARNING = {
    "rfpp": (RFPP, 600, {}),
    "instaflow": (InstaFlow, 600, {"rounds": 2, "reflow_updates": 200, "l2_updates": 100, "flow_steps": 8}),
    "slimflow": (SlimFlow, 600, {"reflow_updates": 350}),
    "slimflow-table": (SlimFlow, 600, {"reflow_updates": 350, "width": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_student_with_random_weights_learns_the_mixture(name):
    """One-step samples close half the energy distance to it, and half the way to where each noise's flow ends."""
    kind, steps, options = LEARNING[name]
    teacher = ToyTeacher(Mixture(STRAIGHT), STRAIGHT)
    student = toy_student(Perceptron(seed=1), STRAIGHT, "velocity")
    if "width" in options:
        student = toy_student(Perceptron(seed=1), table_path(), "eps")
        student.family = Slimmable()
    method = kind(Copies(teacher, student), (1.0,), kind.Options(**options))
    z, x = (part[2048:] for part in mixture_pairs())  # noises that training does not see

    def gaps():
        with torch.no_grad():
            drawn = method.sampler().draw(method.student, z, Condition(), lambda call: z)
        return energy_distance(drawn, x), float((drawn - x).square().mean().sqrt())

    before = gaps()
    optimizer = torch.optim.Adam(method.student.net.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(method, "student", mixture_batch(step))[0].backward()
        optimizer.step()
        method.after_step(method.turn(step))
    after = gaps()
    print(f"{name}: energy {before[0]:.4f} -> {after[0]:.4f}, distance {before[1]:.3f} -> {after[1]:.3f}")
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.5 * before[1]
