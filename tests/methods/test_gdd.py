"""GDD: a student from a discriminator alone, and the two times between which that looks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Examples
from stepdistill.losses.contract import Turn
from stepdistill.methods.gdd import GDD
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Affine, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

PATH = FlowPath()


def method_of(student=None, **options):
    teacher = ToyTeacher(Perceptron(seed=0), PATH)
    return GDD(
        Copies(teacher, toy_student(student or Perceptron(seed=1), PATH)), (1.0,), GDD.Options(**options)
    )


class Zero(nn.Module):
    """Heads that say nothing: H logits of zero, with a graph."""

    def __init__(self, heads):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(heads))

    def forward(self, maps):
        return (
            torch.stack([0 * own.flatten(1).sum(1) for own in maps], 1).expand(-1, len(self.own)) + self.own
        )


class Optimal(nn.Module):
    """log p_real / p_made of the sum over both coordinates, Gaussians of one deviation: linear in x."""

    def __init__(self, real, made, deviation):
        super().__init__()
        self.real, self.made, self.deviation = real, made, deviation

    def logits(self, x):
        x, v = x.flatten(1), self.deviation**2
        return ((x - self.made).square() - (x - self.real).square()).sum(1) / (2 * v)


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_that_say_nothing_cost_n_ln_2(heads):
    method, batch = method_of(penalty_weight=0.0), toy_batch(32, images=torch.randn(32, 2, 1, 1))
    method.gan.head = Zero(heads)
    student, critic = (loss_of(method, name, batch)[0] for name in ("student", "discriminator"))
    torch.testing.assert_close(student, torch.tensor(heads * math.log(2)))
    torch.testing.assert_close(critic, torch.tensor(2 * heads * math.log(2)))


@pytest.mark.parametrize("made", [-1.0, 0.5, 2.0])
def test_the_gradient_of_the_best_discriminator_leads_the_mean_to_the_real_one(made, monkeypatch):
    """d loss / d m has the sign of m - mu, and is zero where both are one."""
    student = Affine(made, 0.8)
    method, batch = method_of(student), toy_batch(256)
    best = Optimal(0.5, made, 0.8)
    monkeypatch.setattr(method.gan, "logits", lambda x, t, cond: best.logits(x))
    monkeypatch.setattr(method.gan, "noised", lambda x, batch, stream: (x, torch.zeros(len(x))))
    loss = loss_of(method, "student", batch)[0]
    (slope,) = torch.autograd.grad(loss, student.shift)
    assert float(slope) == pytest.approx(0, abs=1e-7) if made == 0.5 else float(slope) * (made - 0.5) > 0


def test_turns_alternate_after_the_warm_start_and_the_heads_come_first():
    method = method_of(
        warm_start=3, discriminator_updates=2, discriminator_lr_ratio=5.0, warm_start_lr_ratio=7.0
    )
    names = [method.turn(step).network[0] for step in range(9)]
    assert names == list("sssddsdds")
    assert method.phase(2) == "warm start" and method.phase(3) == "adversarial" and method_of().phase(0) == ""
    assert method.lr_ratio(Turn("discriminator", 3)) == 5.0
    assert method.lr_ratio(Turn("student", 0)) == 7.0 and method.lr_ratio(Turn("student", 5)) == 1.0
    assert method.options.needs == {"noise", "prompts", "images", "pairs", "states"}
    assert method_of().options.needs == {"noise", "prompts", "images"}


def test_the_warm_start_has_betas_of_its_own_and_is_then_nobody_elses():
    method = method_of(warm_start=2, warm_start_betas=(0.9, 0.99))
    assert [method.betas(method.turn(step)) for step in range(4)] == [(0.9, 0.99)] * 2 + [None] * 2
    assert method_of(warm_start=2).betas(Turn("student", 0)) is None
    own, shared = GDD.Options(warm_start=2, warm_start_betas=(0.9, 0.99)), GDD.Options(warm_start=2)
    assert (GDD.shared_start(own), GDD.shared_start(shared)) == (0, 2) and GDD.starts_below

    class Other(GDD):
        def turn(self, step):
            return Turn("student", step)

    assert Other.shared_start(shared) == 0


def test_the_penalty_is_lazy_and_weighs_as_if_it_were_not():
    """Every n-th turn of the heads, n times; none without a weight."""
    images = torch.randn(16, 2, 1, 1)
    batch = toy_batch(16, images=images)
    method = method_of(penalty_weight=0.5, penalty_every=4, discriminator_updates=3, warm_start=1)
    critics = [step for step in range(30) if method.turn(step).network == "discriminator"]
    logs = [loss_of(method, Turn("discriminator", step), batch) for step in critics]
    assert [i for i, (_, said) in enumerate(logs) if "penalty" in said] == list(range(0, len(critics), 4))
    loss, said = logs[0]
    penalty = method.gan.gradient_penalty(Examples(images, Condition()), batch)
    torch.testing.assert_close(loss, said["discriminator"] + 0.5 * 4 * penalty)
    assert "penalty" not in loss_of(method_of(penalty_weight=0.0), Turn("discriminator", 0), batch)[1]


def test_both_kinds_are_noised_to_the_options_times():
    method, batch = method_of(noise_times=(0.2, 0.4)), toy_batch(512)
    for stream in ("gan", "gan real"):
        _, t = method.gan.noised(batch.noise, batch, stream)
        assert 0.2 <= float(t.min()) < 0.21 and 0.39 < float(t.max()) < 0.4


@pytest.mark.parametrize("times", [(0.4, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.3, 0.3)])
def test_times_that_are_none_are_refused(times):
    with pytest.raises(UserError, match=r"options.noise_times is .* within \[0, 1\]"):
        method_of(noise_times=times)
