"""GNDMR against closed forms on Gaussians: what its policy climbs, where it rests, and what its actions are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.diffusion.path import FlowPath, Path, TrigPath
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.rewards import Rewards
from stepdistill.methods.gndmr import GNDMR
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

MU, S = 0.7, 0.8
A = torch.tensor([0.3, -0.2])
TIMES = (1.0, 0.75, 0.5, 0.25)
PATHS = {"flow": FlowPath(), "flow shifted": FlowPath(3.0), "trig": TrigPath()}


def linear(images: Tensor, prompt: Tensor) -> Tensor:
    """R = a^T x."""
    return images.flatten(1) @ A


def between(
    student: Any, path: Path = PATHS["flow"], reward: Any = linear, times: Any = TIMES, **options: Any
) -> GNDMR:
    roles = Copies(ToyTeacher(Gaussian(path, MU, S), path), toy_student(student, path))
    method = GNDMR(roles, times, GNDMR.Options.model_validate({"guidance": 1.0, **options}))
    method.rewards = Rewards(lambda x0: x0, (reward,))
    return method


def grouped(group: int, count: int = 16, step: int = 0) -> Batch:
    return replace(toy_batch(count, step), group=group)


@pytest.mark.parametrize("name", PATHS)
def test_realness_is_the_logarithm_of_the_densities_ratio_and_the_tilted_law_is_where_all_samples_are_as_good(
    name: str,
) -> None:
    """A fake network of N(mu + s^2 a w, s^2), p_real exp(w a^T x) / Z: log p_real - log p_fake + w R is one number."""
    path, w = PATHS[name], 1.5
    method = between(Gaussian(path, MU, S), path, noisings=20, score_times=(2e-3, 0.998))
    tilted = Gaussian(path, MU, S)
    tilted.mean = torch.nn.Parameter((MU + S**2 * A * w)[:, None, None])
    method.fake.net = tilted
    x = MU + S * torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = method.realness(x.repeat(200, 1, 1, 1), grouped(8, 1600)).view(200, 8).mean(0)
    laws = [torch.distributions.Normal(mean, S) for mean in (torch.full((2,), MU), MU + S**2 * A * w)]
    real, fake = (law.log_prob(x.flatten(1)).sum(1) for law in laws)
    torch.testing.assert_close(
        found - found.mean(), (real - fake) - (real - fake).mean(), atol=0.05, rtol=0.05
    )
    total = found + w * linear(x, torch.zeros(8))
    assert float(total.std()) < 0.05 * float((w * linear(x, torch.zeros(8))).std())


@pytest.mark.parametrize(("eta", "variance"), [(0.5, 0.297), (0.9, 0.220), (1.0, 0.196)])
def test_the_variance_of_what_a_posterior_mean_draws_by_the_policys_steps(
    eta: float, variance: float
) -> None:
    """Three steps with fresh noise and one to clean data; by the linear recursion."""
    path = PATHS["flow"]
    method = between(Gaussian(path, 0.0, S), path, eta=eta, policy_steps=3)
    with torch.no_grad():
        x = method.generate(toy_batch(100_000))
    assert float(x.var()) == pytest.approx(variance, abs=0.003)


def test_a_number_added_to_a_prompts_rewards_and_their_scale_change_nothing() -> None:
    batch = replace(grouped(4), prompt=torch.arange(16) // 4)
    rewards = [
        linear,
        lambda x, prompt: linear(x, prompt) + 5.0 * prompt,
        lambda x, prompt: (1 + prompt) * linear(x, prompt),
    ]
    plain, moved, scaled = (advantage_of(each, batch) for each in rewards)
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=2e-3)
    assert plain.view(4, 4).mean(1).abs().max() < 1e-5
    torch.testing.assert_close(plain.view(4, 4).std(1, correction=0), torch.ones(4), rtol=1e-3, atol=1e-3)


def advantage_of(reward: Any, batch: Batch, **options: Any) -> Tensor:
    x = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    method = between(Gaussian(PATHS["flow"], MU + 0.2, S), reward=reward, **options)
    method.fake.net = Gaussian(PATHS["flow"], MU + 0.5, S)
    return method.advantage(x, batch)[0].detach()


def test_what_weighs_alone_ranks_alone() -> None:
    batch = grouped(8)
    x = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    by_reward = advantage_of(linear, batch, matching_weight=0.0)
    scores = linear(x, batch.prompt).view(2, 8)
    wanted = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(by_reward, wanted.flatten(), rtol=1e-2, atol=1e-2)
    # The fake law lies above the real one: lower samples are the more real ones.
    real = advantage_of(linear, batch, climb_weight=0.0, noisings=50)
    sums = x.flatten(1).sum(1).view(2, 8)
    assert all(
        float(torch.corrcoef(torch.stack(pair))[0, 1]) < -0.9
        for pair in zip(sums, real.view(2, 8), strict=True)
    )


def test_the_loss_has_the_gradient_of_the_actions_likelihood() -> None:
    path, batch = PATHS["flow"], grouped(4)
    method = between(Gaussian(path, MU + 0.2, S), path, field_weight=0.0)
    net = method.student.net
    loss, _ = loss_of(method, "student", batch)
    found = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        advantage, _ = method.advantage(method.generate(batch), batch)
    wanted = torch.zeros(())
    visited = method.policy(batch)
    assert [visit.time for visit in visited] == [1.0, 0.75] and all(visit.std > 0 for visit in visited)
    for visit in visited:
        said = method.student.predict(visit.x, visit.t, batch.cond)
        kept = torch.cos(torch.tensor(0.45 * torch.pi))
        law = torch.distributions.Normal((1 - visit.end) * said.x0 + visit.end * kept * said.eps, visit.std)
        wanted = wanted - (advantage * law.log_prob(visit.step.state).flatten(1).mean(1)).mean()
    for one, other in zip(found, torch.autograd.grad(wanted, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_sample_without_others_beside_it_learns_by_the_field_alone() -> None:
    """Its advantage is 0. The field's gradient runs through the last call."""
    path, batch = PATHS["flow"], toy_batch(8)
    method = between(Gaussian(path, MU + 0.2, S), path, field_weight=0.5)
    method.fake.net = Gaussian(path, MU + 0.4, S)
    loss, logs = loss_of(method, "student", batch)
    x = method.generate(batch)
    field = method.views_at(x.detach(), batch, "score").field
    assert float(loss.detach()) == pytest.approx(0.25 * float(field.square().mean()), rel=1e-4)
    (found,) = torch.autograd.grad(loss, [method.student.net.mean])
    (wanted,) = torch.autograd.grad(0.5 * (x * field).mean(), [method.student.net.mean])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert {"real", "reward"} <= logs.keys()


def test_the_sample_is_what_the_actions_lead_to_and_the_last_call_is_no_action() -> None:
    path, batch = PATHS["flow"], toy_batch(8)
    method = between(Perceptron(seed=1), path, times=(1.0, 0.5), policy_steps=3)
    assert method.actions == 1
    visit = method.policy(batch)[-1]
    t = torch.full((8,), 0.5)
    assert torch.equal(method.generate(batch), method.student.predict(visit.step.state, t, batch.cond).x0)
    with pytest.raises(UserError, match=r"student\.times is \[1\.0\], but the last call draws nothing"):
        between(Perceptron(), path, times=(1.0,))


def test_needs() -> None:
    assert GNDMR.Options().needs == {"noise", "prompts", "reward", "group"}
    assert GNDMR.Options(climb_weight=0.0).needs == {"noise", "prompts", "group"}


@pytest.mark.parametrize(
    ("start", "options"),
    [(MU, {"matching_weight": 0.0}), (MU - 0.5, {"climb_weight": 0.0})],
    ids=["by a reward", "by realness"],
)
def test_the_policy_alone_climbs(start: float, options: dict[str, Any]) -> None:
    """Without a field: towards a for R = a^T x, and back to the teacher where the fake network knows the student."""
    path = PATHS["flow"]
    method = between(Gaussian(path, start, S), path, field_weight=0.0, **options)
    net, fake = method.student.net, Gaussian(path, start, S)
    net.mean = torch.nn.Parameter(torch.full((2, 1, 1), start))
    fake.mean, method.fake.net = net.mean, fake
    optimizer = torch.optim.Adam([net.mean], lr=0.02)
    for step in range(40):
        optimizer.zero_grad()
        loss_of(method, "student", grouped(16, 128, step))[0].backward()
        optimizer.step()
    moved = (net.mean.detach().flatten() - start).tolist()
    if options.get("climb_weight") == 0.0:
        assert all(0.2 < each < 0.8 for each in moved)
    else:
        assert moved[0] > 0.2 and moved[1] < -0.2


def test_fresh_noise_of_the_steps_after_the_actions_is_counted_on() -> None:
    path, batch = PATHS["flow"], toy_batch(8)
    method = between(Perceptron(seed=1), path, renoise=True, policy_steps=1)
    x = method.policy(batch)[-1].step.state
    with torch.no_grad():
        for call, (t, s) in enumerate(((0.75, 0.5), (0.5, 0.25)), 1):
            said = method.student.predict(x, torch.full((8,), t), batch.cond).x0
            x = path.noised(said, batch.fresh(call), torch.full((8,), s))
        wanted = method.student.predict(x, torch.full((8,), 0.25), batch.cond).x0
    torch.testing.assert_close(method.generate(batch), wanted)
    assert not GNDMR.starts_below


def test_realness_of_a_stretch_of_noise_is_the_sum_of_its_parts() -> None:
    """It is an integral over time, taken by random times."""
    path, x = PATHS["flow"], torch.full((4, 2, 1, 1), MU + 0.3)
    found = []
    for low, high in ((0.2, 0.8), (0.2, 0.4), (0.4, 0.8)):
        method = between(Gaussian(path, MU, S), path, noisings=20, score_times=(low, high))
        method.fake.net = Gaussian(path, MU + 1.0, S)
        with torch.no_grad():
            found.append(float(method.realness(x.repeat(500, 1, 1, 1), grouped(4, 2000)).mean()))
    assert abs(found[0]) > 0.1 and found[0] == pytest.approx(found[1] + found[2], rel=0.03)


def test_the_reward_that_is_logged_is_the_mean_of_the_samples() -> None:
    method, batch = between(Gaussian(PATHS["flow"], MU, S)), grouped(4)
    _, logs = method.advantage(x := method.generate(batch).detach(), batch)
    assert float(logs["reward"]) == pytest.approx(float(linear(x, batch.prompt).mean()))
