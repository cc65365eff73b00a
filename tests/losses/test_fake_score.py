"""What the methods with a fake score share: how it follows, where it is compared, and every weight of their losses."""

from __future__ import annotations

import pytest
import torch
from matching_toy import FAMILY, MU, S, full_batch
from table_toy import TABLE, Eps, eps_teacher, gaussian_eps
from tiny import shaken, tiny_prompts
from torch import nn

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import MethodOptions
from stepdistill.losses.fake_score import FakeScoreOptions, denoising_loss, turn_at, views_of
from stepdistill.losses.regression import annealed, warm_start_rate
from stepdistill.methods.diff_instruct import DiffInstruct
from stepdistill.methods.dmd import DMD
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.methods.sid import SiD
from stepdistill.methods.sim import SIM
from stepdistill.networks.roles import Copies
from stepdistill.networks.student import Student
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Perceptron,
    ToyTeacher,
    clear,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

BINS = [(k / 5, (k + 1) / 5) for k in range(5)]


# --- how the fake network follows --------------------------------------------------------------------------------


def errors(denoiser, x):
    """Mean squared error of x0 on samples x [B, 2, 1, 1] noised to t uniform in each of five bins."""
    generator, found = torch.Generator().manual_seed(5), []
    for low, high in BINS:
        t = low + (high - low) * torch.rand(len(x), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            said = denoiser.predict(TABLE.noised(x, eps, t), t, toy_batch(1).cond).x0
        found.append(float((said - x).square().mean()))
    return found


@pytest.mark.parametrize("kind", ["x0", "output"])
def test_a_fake_network_with_an_eps_head_follows_at_all_noise_levels_by_its_loss_in_x0(kind):
    """After 100 updates on samples of N(0.5, 0.3^2) it errs less than the teacher, which does not know them, in each of
    five bins of t. By its loss in eps, which weighs it by 1 / 213 at t = 1, it errs more in the noisiest."""
    teacher = eps_teacher()
    fake = Copies(teacher).add("fake")
    optimizer = torch.optim.Adam(fake.net.parameters(), lr=1e-3)
    for step in range(100):
        batch = toy_batch(64, step)
        optimizer.zero_grad()
        denoising_loss(fake, 0.5 + 0.3 * batch.noise, batch, kind).backward()
        nn.utils.clip_grad_norm_(fake.net.parameters(), 10.0)
        optimizer.step()
    x = 0.5 + 0.3 * torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(4))
    ours, theirs = errors(fake, x), errors(teacher.denoiser, x)
    better = [own < 0.95 * other for own, other in zip(ours, theirs, strict=True)]
    assert better == ([True] * 5 if kind == "x0" else [True] * 4 + [False]), (ours, theirs)


def test_the_two_losses_are_one_error_in_two_units():
    """On a table (x0_said - x0) = -(sigma / alpha) (eps_said - eps), sample by sample."""
    teacher, batch = eps_teacher(), toy_batch(1, 3)
    fake, x = Copies(teacher).add("fake"), 0.5 * batch.noise
    alpha, sigma = TABLE.alpha_sigma(batch.draws.uniform("fake t"))
    by_x0, by_eps = (float(denoising_loss(fake, x, batch, kind).detach()) for kind in ("x0", "output"))
    assert by_x0 == pytest.approx(float((sigma / alpha) ** 2) * by_eps, rel=1e-3)


# --- where the scores are compared -------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "scale"), [(None, 7.5), (0.0, 0.0), (1.0, 1.0), (1.25, 1.25)])
def test_score_guidance_is_that_of_the_pairs_only_where_none_is_given(given, scale):
    assert FakeScoreOptions(guidance=7.5, score_guidance=given).score_scale == scale


def test_without_guidance_a_teacher_needs_no_unconditional_mode(teacher_of):
    """A score guidance of 1 calls the teacher plainly, where any other asks for the mode that an unconditional UNet has
    not."""
    teacher = teacher_of("unet-ddpm")
    fake, noise = (
        Copies(teacher).add("fake"),
        torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0)),
    )
    batch = Batch(Draws(0, 0, 0, 2), teacher.codec.shape, teacher.codec.encode(["0", "0"]), torch.zeros(2))
    assert float(views_of(fake, teacher, noise, batch, FakeScoreOptions(), 1.0).error.abs().max()) == 0.0
    with pytest.raises(UserError, match="needs an unconditional mode"):
        views_of(fake, teacher, noise, batch, FakeScoreOptions(), 1.5)


def test_without_fake_steps_every_turn_is_the_students():
    assert {turn_at(step, FakeScoreOptions(fake_updates=0), 0) for step in range(4)} == {"student"}


# --- every method of the family ----------------------------------------------------------------------------------


def on_table(kind, mean, deviation=S, times=(1.0,), unguided=None, **options):
    """A method of Gaussians whose teacher N(MU, S^2), student and exact fake network N(mean, deviation^2) are eps
    networks on a table, as those of Stable Diffusion."""
    null = None if unguided is None else gaussian_eps(unguided, S)
    teacher = ToyTeacher(gaussian_eps(MU, S), TABLE, "eps", unguided=null)
    student = toy_student(Eps(Affine(mean, deviation)), TABLE, "eps")
    if kind is PhasedDMD:
        options = {"phases": len(times), **options}
    method = kind(Copies(teacher, student), times, kind.Options(**{"guidance": 1.0, **options}))
    method.fake.net = gaussian_eps(mean, deviation).requires_grad_(False)
    if kind is FDistill:
        method.gan.head = Planted(torch.zeros(1))
    return method


class Planted(nn.Module):
    """A head that gives the same logits to whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, features):
        return self.logits.expand(len(features))


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_with_eps_heads_on_a_table_the_gradient_of_a_mean_shift_is_the_closed_form(kind, shift):
    """With e = (m - mu) sigma^2 / V in every element of a sample: DMD and f-distill (logits of 0) e / mean|x - x0_r|,
    Diff-Instruct e, SiD e (sigma^2 / V) over that normaliser, SIM 2 e (sigma^2 / V) / sqrt(2 e^2 + c^2), Phased DMD of
    one phase (alpha / sigma)^2 e."""
    method, batch = on_table(kind, MU + shift), toy_batch(64)
    t = batch.draws.uniform("score t", 0.02, 0.98)
    alpha, sigma = TABLE.alpha_sigma(t)
    part = sigma**2 / (alpha**2 * S**2 + sigma**2)
    x = MU + shift + S * batch.noise
    x_t = TABLE.noised(x, batch.draws.normal("score eps", SHAPE), t)
    real = method.teacher.predict(x_t, t, batch.cond).x0
    e, size = shift * part, (x - real).abs().flatten(1).mean(1)
    c = 0.00054 * 2**0.5
    expected = {
        DMD: e / size, FDistill: e / size, DiffInstruct: e, SiD: e * part / size,
        SIM: 2 * e * part / (2 * e**2 + c**2).sqrt(), PhasedDMD: (alpha / sigma) ** 2 * e,
    }[kind]  # fmt: skip
    turn = method.turn(method.options.fake_updates).network
    net = modules_of(method)[turn].net
    loss_of(method, turn, batch)[0].backward()
    assert float(net.shift.grad) == pytest.approx(float(expected.mean()), rel=2e-3)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    "options", [{"guidance": 2.5}, {"guidance": 4.0, "score_guidance": 2.5}, {"score_guidance": 0}]
)
def test_guidance_moves_the_fixed_point_and_score_guidance_goes_first(kind, options):
    """Conditional N(c, s), unconditional N(u, s): guided by g, the goal is u + g (c - u), where both scores agree at
    every point; at the unguided mean they do not."""
    null = 0.2
    goal = null + options.get("score_guidance", options.get("guidance")) * (MU - null)
    there, away = (on_table(kind, mean, unguided=null, **options) for mean in (goal, MU))
    sizes = []
    for method in (there, away):
        batch = toy_batch(16)
        logs = loss_of(method, method.turn(method.options.fake_updates).network, batch)[1]
        sizes.append(float(logs["error" if "error" in logs else "field"]))
    assert sizes[0] < 1e-4 and sizes[1] > 1e-2, sizes


def perceptrons(kind, times=(1.0, 0.5), **options):
    """A method between perceptrons on a flow path, off its start."""
    teacher = ToyTeacher(Perceptron(), FlowPath(), "velocity", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), FlowPath(), "velocity")
    method = kind(Copies(teacher, student), times, kind.Options(**options))
    with torch.no_grad():
        for parameter in method.fake.net.parameters():
            parameter *= 1.1
    return method


WEIGHTS = [
    *((kind, "student", "adversarial_weight", "gan", 0.0) for kind in FAMILY[:-1]),
    *((kind, "student", "pair_weight", "regression", 0.0) for kind in FAMILY[:-1]),
    *((kind, "fake", "discriminator_weight", "discriminator", 0.0) for kind in FAMILY[:-1]),
    (DMD, "student", "first_step_weight", "first_step", 0.1),
]


@pytest.mark.parametrize(("kind", "turn", "option", "term", "low"), WEIGHTS)
def test_a_weight_is_what_its_term_is_multiplied_by(kind, turn, option, term, low):
    """loss(w = a) - loss(w = b) = (a - b) term on one batch, and so are the gradients."""
    high, batch = 0.7, full_batch()
    more = {"adversarial_weight": 0.2} if option == "discriminator_weight" else {}
    losses, logs, gradients = [], {}, []
    for weight in (low, high):
        method = perceptrons(kind, **{**more, option: weight})
        loss, logs = loss_of(method, turn, batch)
        parameters = list(modules_of(method)[turn].parameters())
        losses.append(float(loss.detach()))
        for value in (loss, logs[term]) if weight == high else (loss,):
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            found = [p.new_zeros(p.shape) if g is None else g for p, g in zip(parameters, found, strict=True)]
            # A network's own parameters alone: a discriminator is there only with its weight.
            gradients.append(torch.cat([g.flatten() for g in found])[:1000])
    assert abs(float(logs[term].detach())) > 1e-3
    assert losses[1] - losses[0] == pytest.approx(
        (high - low) * float(logs[term].detach()), rel=1e-4, abs=1e-6
    )
    torch.testing.assert_close(gradients[1] - gradients[0], (high - low) * gradients[2], rtol=1e-3, atol=1e-6)
    assert float(gradients[2].abs().max()) > 1e-6


@pytest.mark.parametrize("kind", FAMILY)
def test_a_turn_holds_no_graph_to_the_other_network(kind):
    """Also where nothing is frozen: the samples a fake network learns from have no graph to the student, and a field by
    which a student is pushed has none to the fake network. (SiD and SIM differentiate through it.)"""
    method = perceptrons(kind)
    of_fake = list(method.fake.net.parameters())
    own = [p for name, net in modules_of(method).items() if name != "fake" for p in net.parameters()]
    loss_of(method, "fake", full_batch(step=0))[0].backward()
    assert all(p.grad is None for p in own) and all(p.grad is not None for p in of_fake)
    if kind in (DMD, DiffInstruct, PhasedDMD):
        clear(method)
        step = next(step for step in range(20) if method.turn(step).network != "fake")
        loss_of(method, method.turn(step).network, full_batch(step=step))[0].backward()
        assert all(p.grad is None for p in of_fake) and any(p.grad is not None for p in own)


@pytest.mark.parametrize("kind", FAMILY)
def test_in_bf16_the_same_weights_learn_in_the_same_direction(kind, teacher_of):
    """Two steps, of which only the second has a graph, on a tiny Stable Diffusion under autocast: every weight that has
    a gradient in float32 has one, and all together they point the same way."""
    teacher, gradients = teacher_of("sd"), []
    cond = teacher.codec.encode(tiny_prompts("sd", 2))
    step = next(step for step in range(9) if Draws(0, step, 0, 2).shared_integer("exit", 2) == 1)
    draws = Draws(0, step, 0, 2)
    images = Examples(draws.normal("images", teacher.codec.shape), cond)
    batch = Batch(draws, teacher.codec.shape, cond, torch.zeros(draws.count), images)
    more = {"phases": 1} if kind is PhasedDMD else {}
    for enabled in (False, True):
        options = kind.Options(guidance=2.0, **more)
        method = kind(Copies(teacher, Student.from_teacher(teacher)), (1.0, 0.5), options)
        shaken(method.fake.net)  # a copy of the teacher sees nothing to learn
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = loss_of(method, "student", batch)
        loss.backward()
        gradients.append([p.grad for p in modules_of(method)["student"].parameters()])
    full, half = gradients
    assert [g is not None and bool(g.any()) for g in full] == [g is not None and bool(g.any()) for g in half]
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(full, half, strict=True) if a is not None]
    one, other = (torch.cat(values) for values in zip(*pairs, strict=True))
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98
    assert not torch.equal(one, other)


def test_which_students_may_start_below_pure_noise():
    """Those whose samples are matched as a distribution; experts meet trajectories."""
    assert [kind.starts_below for kind in (DMD, DiffInstruct, FDistill, SiD, SIM, PhasedDMD)] == [
        True
    ] * 5 + [False]


def test_the_rate_of_a_warm_start_is_annealed_within_it():
    options = DMD.Options(warm_start=10, warm_start_lr_ratio=20.0)
    rates = [warm_start_rate(step, options) for step in range(12)]
    assert rates[:10] == pytest.approx([20.0 * annealed(step / 10) for step in range(10)])
    assert rates[0] == pytest.approx(20.0) and rates[9] < 0.1 * rates[0] and rates[10:] == [1.0, 1.0]


def test_the_stretches_of_a_run_have_names():
    options = FakeScoreOptions(fake_warm_start=3)
    said = [options.phase(step, 2) for step in range(7)]
    assert said == ["warm start"] * 2 + ["fake score alone"] * 3 + ["matching"] * 2


def test_a_warm_start_is_shared_by_methods_whose_first_turns_are_plain():
    assert DMD.shared_start(DMD.Options(warm_start=5)) == 5
    assert SiD.shared_start(SiD.Options(warm_start=5)) == 5
    assert PhasedDMD.shared_start(PhasedDMD.Options(warm_start=5)) == 0

    class OtherLoss(DMD):
        def regression(self, batch):
            return super().regression(batch)

    class OtherTurns(DMD):
        def turn(self, step):
            return super().turn(step)

    assert OtherLoss.shared_start(DMD.Options(warm_start=5)) == 0
    assert OtherTurns.shared_start(DMD.Options(warm_start=5)) == 0
    assert DMD.shared_start(MethodOptions()) == 0


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_group_shares_its_noise_and_its_time(group):
    fake = toy_student(Perceptron(), FlowPath())
    teacher = ToyTeacher(Perceptron(seed=1), FlowPath())
    x, options = torch.zeros(8, *SHAPE), FakeScoreOptions()
    views = views_of(fake, teacher, x, toy_batch(8), options, 1.0, group=group)
    for i in range(8):
        for j in range(8):
            shared = i // group == j // group
            assert (
                bool(views.t[i] == views.t[j]) == shared and torch.equal(views.x_t[i], views.x_t[j]) == shared
            )


def test_the_network_that_follows_is_said_to_follow():
    """Terms, ``train.lr_of`` and averages are not for it."""
    teacher = ToyTeacher(Perceptron(), FlowPath())
    for kind in (DMD, SiD, DiffInstruct, FDistill, SIM):
        method = kind(Copies(teacher, toy_student(Perceptron(seed=1), FlowPath())), (1.0,), kind.Options())
        trained = method.trained()
        assert trained["fake"].follows and not trained["student"].follows
