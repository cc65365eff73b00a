"""Centred rewards: what a group shares is no merit, the optimum has loss 0, and who follows whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Turn
from stepdistill.losses.rewards import Rewards
from stepdistill.methods.crd import CRD, implicit_reward, mismatch
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

PATH, MU, S = FlowPath(), 0.7, 0.8
A = torch.tensor([0.3, -0.2])


def linear(images: Tensor, prompt: Tensor) -> Tensor:
    """R = a^T x."""
    return images.flatten(1) @ A


def between(student: Any, teacher: Any, reward: Any = linear, output: Any = "x0", **options: Any) -> CRD:
    roles = Copies(ToyTeacher(teacher, PATH, output), toy_student(student, PATH, output))
    method = CRD(roles, (1.0, 0.75, 0.5, 0.25), CRD.Options.model_validate({"guidance": 1.0, **options}))
    method.rewards = Rewards(lambda x0: x0, (reward,))
    return method


def apart(**options: Any) -> CRD:
    """With a student that left what it was."""
    method = between(
        Perceptron(seed=1), Perceptron(seed=0), options.pop("reward", linear), "velocity", **options
    )
    with torch.no_grad():
        for value in method.student.net.parameters():
            value.add_(0.05)
    return method


def grouped(group: int, count: int = 16, step: int = 0) -> Batch:
    return replace(toy_batch(count, step), group=group)


def gradient(method: CRD, batch: Batch) -> Tensor:
    value, _ = loss_of(method, "student", batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(method.student.net.parameters()))])


def test_the_loss_is_zero_at_the_optimum_and_nowhere_near_it() -> None:
    """p = p_old exp(R / beta) / Z on eight atoms of each of two prompts: Z, another for each, never comes in."""
    generator = torch.Generator().manual_seed(0)
    old = torch.rand(2, 8, generator=generator, dtype=torch.float64).softmax(1)
    reward, beta = torch.randn(2, 8, generator=generator, dtype=torch.float64), 0.3
    tilted = old * (reward / beta).exp()
    log_ratio = (tilted / tilted.sum(1, keepdim=True) / old).log()
    assert float(mismatch(log_ratio.flatten(), reward.flatten(), beta, 8).max()) < 1e-25
    assert float(mismatch(log_ratio.flatten(), reward.flatten(), 2 * beta, 8).min()) > 1e-6
    # A mean over both prompts would leave the difference of their normalisers.
    assert float(mismatch(log_ratio.flatten(), reward.flatten(), beta, 16).min()) > 1e-6


def test_the_gradient_is_the_same_whether_it_goes_through_the_mean_or_not() -> None:
    r, reward = torch.randn(8, requires_grad=True), torch.randn(8)
    through = torch.autograd.grad(mismatch(r, reward, 0.7, 4).mean(), r)[0]
    mean = r.detach().view(2, 4).mean(1).repeat_interleave(4)
    centred = reward - reward.view(2, 4).mean(1).repeat_interleave(4)
    stopped = torch.autograd.grad((0.7 * (r - mean) - centred).square().mean(), r)[0]
    torch.testing.assert_close(through, stopped)


def test_the_implicit_reward_is_odd_zero_at_the_old_and_divided_by_each_ones_own_size() -> None:
    v, old, target = torch.randn(3, 6, 2, 1, 1)
    torch.testing.assert_close(implicit_reward(v, old, target), -implicit_reward(old, v, target))
    assert not bool(implicit_reward(v, v, target).any())
    torch.testing.assert_close(
        implicit_reward(3 * v, 3 * old, 3 * target), 3 * implicit_reward(v, old, target)
    )
    e, e_old = v - target, old - target
    wanted = e_old.square().mean((1, 2, 3)) / e_old.abs().mean((1, 2, 3)) - e.square().mean(
        (1, 2, 3)
    ) / e.abs().mean((1, 2, 3))
    torch.testing.assert_close(implicit_reward(v, old, target), wanted)
    # The size has no gradient: d/dv of -|e|^2 / w is -2 e / (n w).
    leaf = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(implicit_reward(leaf, old, target).sum(), leaf)
    torch.testing.assert_close(slope, -e / e.abs().mean((1, 2, 3), keepdim=True))


def test_a_number_added_to_all_rewards_of_a_prompt_and_their_scale_change_nothing() -> None:
    batch = grouped(4)
    batch = replace(batch, prompt=torch.arange(16) // 4)
    plain = gradient(apart(), batch)
    moved = gradient(apart(reward=lambda x, prompt: linear(x, prompt) + 5.0 * prompt), batch)
    scaled = gradient(apart(reward=lambda x, prompt: (1 + prompt) * linear(x, prompt)), batch)
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-4)
    other = gradient(apart(reward=lambda x, prompt: -linear(x, prompt)), batch)
    assert float((other - plain).norm() / plain.norm()) > 0.1


def test_at_the_old_and_the_reference_what_is_left_is_the_advantages_own_spread() -> None:
    """r = 0 and no distance: the loss is c times the variance of A in groups, and its gradient climbs."""
    method, batch = between(Gaussian(PATH, MU, S), Gaussian(PATH, MU, S)), grouped(8)
    loss, logs = loss_of(method, "student", batch)
    assert float(logs["reference"].detach()) == 0.0
    # A standardised advantage has variance 1, and A is a tenth of it.
    assert float(loss.detach()) == pytest.approx(5 * 0.01, rel=1e-3)
    (slope,) = torch.autograd.grad(loss, [method.student.net.mean])
    loss_of(method, "student", batch)
    x, scores = method.judged(batch)
    better = (x[:8] * (scores[0, :8] - scores[0, :8].mean())[:, None, None, None]).mean()
    assert float(slope) * float(better) < 0  # descent moves the mean towards what is better


def test_the_reference_is_guided_and_weighs_good_samples_more() -> None:
    method = between(Gaussian(PATH, MU + 0.1, S), Gaussian(PATH, MU, S), reference_weight=2.0, noisings=3)
    batch = grouped(8, 8)
    x, _ = method.judged(batch)
    _, away = method.compared(x, batch, 1)
    t = batch.draws.of_groups(8).uniform("noising t 1", 0.34, 0.66)
    # x0 is off by 0.1 sigma^2 / V, and the velocity by that over t.
    wanted = (0.1 * t / ((1 - t) ** 2 * S**2 + t**2)) ** 2
    torch.testing.assert_close(away.detach(), wanted.expand(8), rtol=1e-3, atol=1e-6)
    alone, logs = loss_of(
        between(Gaussian(PATH, MU + 0.1, S), Gaussian(PATH, MU, S), reference_updates=1), "student", batch
    )
    assert float(alone.detach()) == float(logs["reference"].detach()) and "mismatch" not in logs
    heavy, light = (
        loss_of(
            between(Gaussian(PATH, MU + 0.1, S), Gaussian(PATH, MU, S), reference_weight=w), "student", batch
        )
        for w in (1.0, 0.0)
    )
    added = float((heavy[0] - light[0]).detach())
    # A is 1/2 in the mean, and all are as far away.
    assert added == pytest.approx(float(heavy[1]["reference"].detach()) * (0.5 * (1 - 1e-3) + 1e-3), rel=1e-4)


def test_samples_of_a_group_share_their_times_and_not_their_noise() -> None:
    method, batch = between(Perceptron(seed=1), Perceptron(seed=0), output="velocity"), grouped(4)
    seen: list[tuple[Tensor, Tensor]] = []
    predict = method.old.predict
    method.old.predict = lambda x, t, cond, s=None: (seen.append((x, t)), predict(x, t, cond, s))[1]  # type: ignore[method-assign]
    x, _ = method.judged(batch)
    for call in range(4):
        method.compared(torch.zeros_like(x), batch, call)
    for call, (x_t, t) in enumerate(seen):
        assert torch.equal(t, t[::4].repeat_interleave(4)) and len(set(t.tolist())) == 4
        assert bool(((t >= 0.02 + 0.24 * call) & (t <= 0.02 + 0.24 * (call + 1))).all())
        assert len(set((x_t / t.view(-1, 1, 1, 1)).flatten().tolist())) == 32


def test_the_averages_follow_at_their_own_pace() -> None:
    method = between(Perceptron(), Perceptron(), output="velocity", reference_updates=10, draws_itself=75)
    assert method.decays(9) == (0.0, 0.0) and method.decays(10) == (0.25, 0.0)
    assert method.decays(20) == pytest.approx((0.3, 0.0)) and method.decays(85)[1] == 0.0
    assert method.decays(105) == pytest.approx((0.25 + 95 * 0.005, 20 * 0.0075))
    assert method.decays(10_000) == (0.999, 0.999)
    assert method.phase(9) == "reference" and method.phase(10) == "reward"
    with torch.no_grad():
        for value in method.student.net.parameters():
            value.fill_(1.0)
        for name in ("old", "drawing"):
            for value in method.roles.parameters(name):
                value.fill_(0.0)
    method.after_step(Turn("student", 10))
    means = [float(method.roles.parameters(name)[0].mean()) for name in ("old", "drawing")]
    assert means == pytest.approx([0.75, 1.0])


def test_samples_are_drawn_by_their_own_average_without_a_graph() -> None:
    method, batch = between(Perceptron(seed=1), Perceptron(seed=0), output="velocity"), grouped(4)
    before, _ = method.judged(batch)
    with torch.no_grad():
        for value in method.student.net.parameters():
            value.add_(0.1)
    assert torch.equal(method.judged(batch)[0], before) and not before.requires_grad
    drawn = method.sampler().draw(method.drawing, batch.noise, batch.cond, batch.fresh)
    assert torch.equal(drawn, before)


def test_a_grouped_batch_is_the_mean_of_its_halves() -> None:
    method, batch = apart(), grouped(4)
    whole, *halves = (gradient(method, part) for part in (batch, *batch.split(2)))
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-4, atol=1e-6)


def test_a_gaussian_moves_to_where_its_reward_is_higher() -> None:
    """A mean that learns from comparisons alone: towards a for R = a^T x, whatever the reward's scale."""
    method = between(Gaussian(PATH, MU, S), Gaussian(PATH, MU, S), lambda x, p: 50 * linear(x, p))
    net = method.student.net
    net.mean = torch.nn.Parameter(torch.full((2, 1, 1), MU))
    for name in ("old", "drawing"):
        method.roles[name].net.mean = torch.nn.Parameter(torch.full((2, 1, 1), MU))
    optimizer = torch.optim.Adam([net.mean], lr=0.01)
    for step in range(40):
        optimizer.zero_grad()
        loss_of(method, Turn("student", step), grouped(8, 64, step))[0].backward()
        optimizer.step()
        method.after_step(Turn("student", step))
    moved = (net.mean.detach().flatten() - MU).tolist()
    assert moved[0] > 0.1 and moved[1] < -0.1


def test_an_advantage_is_clipped_and_what_is_apart_weighs_by_clip_over_beta() -> None:
    """At the old and the reference, where the loss is c / beta times the variance of what is left of A in groups."""
    method = between(Gaussian(PATH, MU, S), Gaussian(PATH, MU, S), advantage_clip=0.8, beta=2.0)
    loss, logs = loss_of(method, "student", grouped(8))
    _, scores = method.judged(grouped(8))
    of_groups = scores[0].view(2, 8)
    standard = (of_groups - of_groups.mean(1, keepdim=True)) / of_groups.std(1, correction=0, keepdim=True)
    share = standard.clamp(-0.8, 0.8) / 1.6 + 0.5
    assert bool((standard.abs() > 0.8).any())
    assert float(loss.detach()) == pytest.approx(0.8 / 2 * float(share.var(1, correction=0).mean()), rel=1e-3)
    assert float(logs["reward"]) == pytest.approx(float(scores.mean()))


def test_its_averages_take_no_gradient_and_its_students_steps_no_fresh_noise() -> None:
    method = apart()
    assert not any(p.requires_grad for name in ("old", "drawing") for p in method.roles.parameters(name))
    assert not method.sampler().renoise
