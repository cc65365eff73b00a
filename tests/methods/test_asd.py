"""ASD against closed forms: which steps a rollout makes, what each of its discriminators sees, and where they rest."""

from __future__ import annotations

import math

import pytest
import torch
from matching_toy import MU, S
from mixture_toy import Batched
from table_toy import TABLE
from torch import nn

from stepdistill.diffusion.path import FlowPath, per_sample
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.gan import relativistic_loss
from stepdistill.methods.asd import ASD
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

PATH = FlowPath()
FOUR = (1.0, 0.75, 0.5, 0.25)


class Seen(Gaussian):
    """The exact denoiser of a Gaussian, whose features are the state itself."""

    def __init__(self, mean=MU, deviation=S):
        super().__init__(PATH, mean, deviation)
        self.inner = nn.Identity()

    def forward(self, x, t, cond):
        return super().forward(self.inner(x), t, cond)


class Logits(nn.Module):
    """Planted logits of the states."""

    def __init__(self, of):
        super().__init__()
        self.of, self.weight = of, nn.Parameter(torch.zeros(3))

    def forward(self, x, output=0):
        return self.of(x) + self.weight[output]


def method_of(kind=ASD, times=FOUR, student=None, fake=None, **options):
    teacher = ToyTeacher(Gaussian(PATH, MU, S), PATH)
    roles = Copies(teacher, toy_student(student or Perceptron(seed=1), PATH))
    method = kind(roles, times, kind.Options(guidance=1.0, **options))
    method.fake.net = fake or Perceptron(seed=3)
    return method


def step_of(method, place):
    """The first step whose rollout has ``counts[place]`` steps."""
    return next(s for s in range(100) if method.place(toy_batch(8, s)) == place)


def many(count):
    return Batch(Batched(0, 0, 0, count), SHAPE, Condition(), torch.zeros(count))


@pytest.mark.parametrize(("steps", "counts"), [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (4, (1, 2, 4))])
def test_a_student_draws_in_every_divisor_of_its_steps(steps, counts):
    method = method_of(times=tuple(1 - i / steps for i in range(steps)))
    assert method.counts == counts == method.sampler().step_counts
    assert {method.place(toy_batch(8, s)) for s in range(60)} == set(range(len(counts)))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_steps_are_every_other_of_the_students_times_and_the_last_alone_has_a_graph(place):
    method, batch, seen = method_of(), toy_batch(8), []
    forward = method.student.net.forward
    method.student.net.forward = lambda x, t, cond: seen.append((t[0].item(), x)) or forward(x, t, cond)
    x = method.drawn(place, batch)
    assert [t for t, _ in seen] == [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5, 0.25]][place]
    assert torch.equal(seen[0][1], batch.noise) and x.requires_grad
    assert not any(state.requires_grad for _, state in seen)


def test_a_rollout_of_fewer_steps_ends_at_its_last_call_and_one_of_all_at_any():
    ends = {place: set() for place in range(3)}
    for step in range(80):
        method, seen = method_of(), []
        forward = method.student.net.forward
        method.student.net.forward = lambda x, t, cond, f=forward, s=seen: (
            s.append(t[0].item()) or f(x, t, cond)
        )
        batch = toy_batch(2, step)
        method.generate(batch)
        ends[method.place(batch)].add(tuple(seen))
    assert ends == {0: {(1.0,)}, 1: {(1.0, 0.5)}, 2: {FOUR[:k] for k in (1, 2, 3, 4)}}


def test_the_two_samples_of_a_pair_come_from_unrelated_noise():
    """Of an affine student, whose sample is its noise: no correlation, and the same conditions."""
    method, batch = method_of(student=Affine(0.0, 1.0)), many(20_000)
    with torch.no_grad():
        x, y = method.drawn(0, batch).flatten(), method.drawn(0, batch, "other ").flatten()
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 0.015
    assert torch.equal(x, batch.noise.flatten())


def test_with_all_steps_or_a_weight_of_nothing_it_is_dmd():
    asd, dmd = method_of(fake_updates=1), method_of(DMD, fake_updates=1)
    alone, last = method_of(self_weight=0.0), step_of(asd, 2)
    for turn in (asd, dmd):
        assert turn.sampler().times == FOUR
    for step in (s for s in range(last, last + 20) if asd.place(toy_batch(8, s)) == 2):
        assert torch.equal(*(loss_of(each, "student", toy_batch(8, step))[0] for each in (asd, dmd)))
    assert alone.own is None and [*modules_of(alone)["fake"].parameters()] == [*alone.fake.net.parameters()]
    once = [method_of(kind, (1.0,)) for kind in (ASD, DMD)]
    for turn in ("student", "fake"):
        one, two = (loss_of(each, turn, toy_batch(8, 3))[0] for each in once)
        assert torch.equal(one, two)


def test_equal_logits_cost_a_bit_and_pull_by_half_and_a_constant_changes_nothing():
    ours, theirs = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([0.3, -2.0])
    loss = relativistic_loss(better=ours, worse=theirs)
    assert float(loss.detach()) == pytest.approx(math.log(2))
    torch.testing.assert_close(torch.autograd.grad(loss, ours)[0], torch.tensor([-0.25, -0.25]))  # of a mean
    torch.testing.assert_close(relativistic_loss(ours + 7, theirs + 7), loss)
    method, step = method_of(fake=Seen(), slope_weight=0.0), step_of(method_of(), 0)
    method.own.head = Logits(lambda x: x.flatten(1).sum(1))
    before = [float(loss_of(method, turn, toy_batch(8, step))[0].detach()) for turn in ("student", "fake")]
    with torch.no_grad():
        method.own.head.weight += 5.0
    after = [float(loss_of(method, turn, toy_batch(8, step))[0].detach()) for turn in ("student", "fake")]
    assert before == pytest.approx(after, rel=1e-5)


def pull(method, batch):
    """What is added to DMD's field: the gradient of the loss in x times its elements, without the field itself."""
    x = method.generate(batch)
    found = []
    for weight in (0.0, method.options.self_weight):
        method.options = method.options.model_copy(update={"self_weight": weight})
        loss, _ = method.match(x, batch)
        found.append(torch.autograd.grad(loss, x, retain_graph=True)[0] * x.numel())
    return found[1] - found[0]


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_the_best_discriminator_of_two_gaussians_pulls_towards_the_one_of_more_steps(shift):
    """log N(x_t; m', V) - log N(x_t; m, V) is linear in x_t, with the slope alpha (m' - m) / V: x is pulled by it, and
    not at all where the two are one."""
    time, weight = 0.5, 0.4
    method = method_of(student=Affine(MU, S), fake=Seen(), self_weight=weight)
    step = step_of(method, 0)
    alpha, sigma = (float(value) for value in PATH.alpha_sigma(torch.tensor(time)))
    slope = alpha * shift / (alpha**2 * S**2 + sigma**2)
    method.own.head = Logits(lambda x: slope * x.flatten(1).sum(1))
    batch = toy_batch(64, step)
    found = pull(method, batch)
    assert bool((found == 0).all()) if shift == 0 else bool((found < 0).all())
    if shift:  # d/dx softplus(-(a - b)) = -sigmoid(-(a - b)) alpha_t slope, with the t and noise of each
        with torch.no_grad():
            x = method.generate(batch)
            y = method.drawn(1, batch, "other ")
            t = batch.draws.uniform("own t")
            seen = [
                slope * PATH.noised(one, batch.draws.normal(f"own {name} eps", SHAPE), t).flatten(1).sum(1)
                for name, one in (("x", x), ("y", y))
            ]
            wanted = -torch.sigmoid(seen[1] - seen[0]) * (1 - t) * slope * 2 * weight
        torch.testing.assert_close(found, per_sample(wanted, x).expand_as(x), rtol=1e-3, atol=1e-5)


def test_the_share_is_how_large_the_pull_is_beside_the_field():
    shares = []
    for weight in (0.1, 0.2):
        method = method_of(self_weight=weight)
        batch = toy_batch(16, step_of(method, 1))
        field = method.views(method.generate(batch), batch).field
        wanted = pull(method, batch).norm() / field.norm()
        shares.append(float(loss_of(method, "student", batch)[1]["share"]))
        assert shares[-1] == pytest.approx(float(wanted.detach()), rel=1e-3)
    assert shares[1] == pytest.approx(2 * shares[0], rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_logit_learns_in_the_rounds_of_its_own_number_alone(place):
    """With all steps a pair is drawn for it. The network that it reads learns to denoise, and nothing from it."""
    method = method_of()
    batch = toy_batch(8, step_of(method, place))
    own = place if place < 2 else batch.draws.shared_integer("pair", 2)
    loss_of(method, "fake", batch)[0].backward()
    last = method.own.head.body[-1]
    assert [bool(row.any()) for row in last.weight.grad] == [own == 0, own == 1]
    plain = method_of(self_weight=0.0)
    loss_of(plain, "fake", batch)[0].backward()
    for one, other in zip(method.fake.net.parameters(), plain.fake.net.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert all(p.grad is None for p in method.student.net.parameters())


def test_the_discriminator_raises_the_sample_of_more_steps_and_the_student_its_own():
    """In opposite directions: D's loss falls with D(y) - D(x), the student's with D(x) - D(y)."""
    method = method_of(fake=Seen(), slope_weight=0.0, discriminator_weight=1.0)
    batch = toy_batch(16, step_of(method, 0))
    method.own.head = Logits(lambda x: 0.5 * x.flatten(1).sum(1))
    with torch.no_grad():
        x, y = method.drawn(0, batch), method.drawn(1, batch, "other ")
        ours, theirs, _ = method.logits(x, y, 0, batch)
    told = float(loss_of(method, "fake", batch)[1]["own discriminator"].detach())
    assert told == pytest.approx(float(torch.nn.functional.softplus(ours - theirs).mean()))
    assert float(loss_of(method, "student", batch)[1]["own"]) == pytest.approx(
        float(torch.nn.functional.softplus(theirs - ours).mean())
    )


def test_the_slopes_are_those_of_the_logits():
    """Of a linear logit a . x_t: |a|^2 at x and at y, in the mean over directions; gamma / 2 times it is paid."""
    method = method_of(fake=Seen(), slope_weight=0.3, discriminator_weight=1.0)
    a = torch.tensor([0.6, -1.1])
    method.own.head = Logits(lambda x: x.flatten(1) @ a)
    batch = many(20_000)
    with torch.no_grad():
        loss, logs = loss_of(method, "fake", batch)
    assert float(logs["slope"]) == pytest.approx(2 * float(a.square().sum()), rel=0.03)
    paid = float(loss - logs["denoising"] - logs["own discriminator"])
    assert paid == pytest.approx(0.15 * float(logs["slope"]), rel=1e-4)


def test_x_and_y_are_seen_at_one_time_under_noise_of_their_own():
    method, batch, seen = method_of(fake=Seen()), many(4000), []
    method.own.head = Logits(lambda x: x.flatten(1).sum(1))
    forward = method.fake.net.forward
    method.fake.net.forward = lambda x, t, cond: seen.append((x, t)) or forward(x, t, cond)
    nothing = torch.zeros(4000, *SHAPE)
    with torch.no_grad():
        method.logits(nothing, nothing, 0, batch)
    (x_t, t), _, (y_t, other), _ = seen
    assert (
        torch.equal(t, other)
        and abs(float(torch.corrcoef(torch.stack([x_t.flatten(), y_t.flatten()]))[0, 1])) < 0.04
    )


@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("path", [TABLE, FlowPath(3.0)], ids=["table", "flow"])
def test_one_stock_scheduler_draws_in_each_of_the_step_counts(path, renoise):
    """At the very times that the student was trained at; it is exported with them all."""
    from sampler_toy import teacher_scheduler

    teacher = ToyTeacher(Perceptron(), path, "v")
    times = tuple(path.shifted(t) for t in FOUR)
    method = ASD(Copies(teacher, toy_student(Perceptron(), path, "v")), times, ASD.Options(renoise=renoise))
    sampler = on_stock_grid(method.sampler(), path, teacher_scheduler())
    assert sampler.times == pytest.approx(times, abs=1.5e-3) and sampler.step_counts == (1, 2, 4)
    for count in sampler.step_counts:
        drawn = on_stock_grid(sampler, path, teacher_scheduler(), count)
        assert drawn.times == pytest.approx(sampler.times[:: 4 // count], abs=1.5e-3)
    name = type(stock_scheduler(sampler, path, teacher_scheduler())).__name__
    assert name == ("LCMScheduler" if renoise else "DDIMScheduler") or path is not TABLE


def test_its_heads_are_trained_with_the_fake_network():
    method = method_of()
    heads = list(method.trained()["fake"].extra.parameters())
    assert heads and all(any(own is head for head in heads) for own in method.own.parameters())
    assert method_of(self_weight=0.0).trained()["fake"].extra is None
