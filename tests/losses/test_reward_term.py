"""The term of rewards: its fixed point, its guards, the samples it decodes, its proxy of latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.losses.contract import Loss, Method, MethodOptions, Predicted, Turn
from stepdistill.losses.latent_reward import LatentReward, LatentRewardTerm, pairwise_divergence
from stepdistill.losses.objective import Objective, shown_name
from stepdistill.losses.reward_term import RewardOptions, RewardTerm, norms
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import Shown
from stepdistill.methods import find_method
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.system.shipped import method_names
from stepdistill.testing.contract import batch_for, build
from stepdistill.testing.toys import Perceptron, ToyTeacher, clear, toy_batch, toy_student

PATH = FlowPath()
STUDENT = Turn("student", 0)


def near(goal):
    """-|x - goal|^2 of each sample, a reward of toy latents that are their own pictures."""
    return lambda x, prompt: -(x - goal).flatten(1).square().sum(1)


def rewards(*each):
    return Rewards(lambda x0: x0, each)


def batch(count=8, step=0):
    made = toy_batch(count, step, pairs=lambda z: 0.3 * z + 0.1)
    return replace(made, pairs=replace(made.pairs, prompt=torch.arange(count) + 100))


def toy(name, times=(1.0,), **options):
    kind = find_method(name)
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    return kind(
        Copies(teacher, toy_student(Perceptron(seed=1), PATH, "velocity")), times, kind.Options(**options)
    )


class Towards(Method):
    """Its student's clean predictions are parameters of its own, which are to be ``goal``; mean over samples of the sum
    over elements, as the reward's."""

    class Options(MethodOptions):
        pass

    shows = frozenset({"prediction"})

    def setup(self):
        self.x0 = nn.Parameter(torch.zeros(4, 2, 1, 1))
        self.goal = torch.tensor([1.0, -1.0])[:, None, None]
        self.t = torch.tensor([0.2, 0.5, 0.9, 1.0])

    def loss(self, turn, batch):
        x0 = self.x0 * 1.0
        value = (x0 - self.goal).square().flatten(1).sum(1).mean()
        return Loss(value, predicted=Predicted(x0, self.t, torch.arange(4)))

    def sampler(self):
        return Sampler(self.times, renoise=False)


def towards():
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    return Towards(Copies(teacher, student), (1.0,), Towards.Options())


def gradient(objective, sample, of):
    loss, _ = objective.loss(STUDENT, sample)
    return torch.autograd.grad(loss, of, allow_unused=True)


def test_the_optimum_lies_between_target_and_reward():
    """min |p - y|^2 + beta |p - a|^2 is p* = (y + beta a) / (1 + beta): descent on loss and term ends there."""
    beta, goal = 0.6, 3.0
    method = towards()
    objective = Objective(method, [RewardTerm(beta, rewards(near(goal)), RewardOptions(of="prediction"))])
    optimizer = torch.optim.SGD([method.x0], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        objective.loss(STUDENT, batch(4))[0].backward()
        optimizer.step()
    wanted = ((method.goal + beta * goal) / (1 + beta)).expand(4, 2, 1, 1)
    torch.testing.assert_close(method.x0.detach(), wanted)


def test_it_goes_up_only_as_far_as_its_target():
    """relu(target - R): the gradient of the reward below the target, none above, and what is wanting as its value."""
    method = towards()
    reward = near(2.0)  # of zeros: -8
    for target, wanting in ((-5.0, 3.0), (-9.0, 0.0)):
        options = RewardOptions(of="prediction", target=target)
        objective = Objective(method, [RewardTerm(1.0, rewards(reward), options)])
        loss, logs = objective.loss(STUDENT, batch(4))
        assert float(logs["term reward"]) == pytest.approx(wanting)
        (moved,) = torch.autograd.grad(loss, [method.x0])
        own = torch.autograd.grad(method.loss(STUDENT, batch(4)).value, [method.x0])[0]
        climb = -4.0 / 4 if wanting else 0.0  # -2 (2 - 0) over the 4 samples
        torch.testing.assert_close(moved - own, torch.full_like(own, climb))


def test_no_reward_of_predictions_from_much_noise():
    method = towards()
    objective = Objective(
        method, [RewardTerm(1.0, rewards(near(2.0)), RewardOptions(of="prediction", below=0.9))]
    )
    (moved,) = gradient(objective, batch(4), [method.x0])
    own = torch.autograd.grad(method.loss(STUDENT, batch(4)).value, [method.x0])[0]
    assert (moved != own).flatten(1).any(1).tolist() == [True, True, True, False]  # times .2, .5, .9 and 1


@pytest.mark.parametrize(("name", "of"), [("lcm", "prediction"), ("dmd", "sample"), ("own", "prediction")])
def test_its_gradient_is_bounded_by_the_methods_own_on_each_sample(name, of):
    """On every row |weight dR| <= |dL|, with its own direction; a small reward is left as it is."""
    method = towards() if name == "own" else build(name, (1.0,))
    count = 4 if name == "own" else 8
    sample = batch(count)
    for weight in (1e3, 1e-9):
        terms = [
            RewardTerm(weight, rewards(near(3.0)), RewardOptions(of=of, bounded=bounded))
            for bounded in (True, False)
        ]
        found = method.loss(STUDENT, sample)
        x0 = found.sample if of == "sample" else found.predicted.x0
        (own,) = torch.autograd.grad(found.value, x0, retain_graph=True)
        moved = []
        for term in terms:
            value = weight * term.value(Shown(method, sample, None, found))
            moved.append(torch.autograd.grad(value, x0, retain_graph=True)[0])
        bounded, free = (each.flatten(1) for each in moved)
        size, most = bounded.norm(dim=1), own.flatten(1).norm(dim=1)
        assert bool((size <= most * (1 + 1e-5)).all()) and bool((most > 0).all())
        if weight > 1:
            torch.testing.assert_close(size, most, rtol=1e-4, atol=1e-9)
            assert bool((torch.cosine_similarity(bounded, free) > 1 - 1e-5).all())
        else:
            assert torch.equal(bounded, free)


@pytest.mark.parametrize("of", ["sample", "prediction"])
def test_at_weight_zero_and_before_its_time_a_method_is_what_it_is(of):
    """beta = 0 is LCM to the last bit; so is any beta before ``after``."""
    method, sample = toy("lcm"), batch()
    plain = Objective(method)
    parameters = list(method.student.net.parameters())
    alone = gradient(plain, sample, parameters)
    for weight, options in ((0.0, RewardOptions(of=of)), (5.0, RewardOptions(of=of, after=1))):
        objective = Objective(method, [RewardTerm(weight, rewards(near(1.0)), options)])
        found = gradient(objective, sample, parameters)
        assert all(torch.equal(one, two) for one, two in zip(alone, found, strict=True))
    late = objective.loss(Turn("student", 1), sample)[0]
    assert float(late) != float(plain.loss(Turn("student", 1), sample)[0])


@pytest.mark.parametrize("of", ["sample", "prediction"])
def test_it_judges_the_same_share_of_samples_however_the_batch_is_cut(of):
    """Every fourth, each told its own prompt; the mean of the halves is the whole, in value and gradient."""
    told: list[Any] = []

    def reward(x, prompt):
        told.append(prompt.tolist())
        return x.flatten(1).mean(1) * (1 + prompt)

    method, whole = toy("lcm", (1.0, 0.5)), batch(8)
    term = RewardTerm(1.0, rewards(reward), RewardOptions(of=of, share=0.25))
    objective = Objective(method, [term])
    parameters = list(method.student.net.parameters())

    def at(sample):
        _, logs = objective.loss(STUDENT, sample)
        found = torch.autograd.grad(logs["term reward"], parameters, allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
        return logs["term reward"].detach(), torch.cat([each.flatten() for each in zeros])

    value, slope = at(whole)
    parts = [at(part) for part in whole.split(2)]
    first = 100 if of == "prediction" else 0
    assert told == [[first + 3, first + 7], [first + 3], [first + 7]]
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, value)
    torch.testing.assert_close(sum(part[1] for part in parts) / 2, slope, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_the_last_call_or_all_of_them():
    """With all calls it is the gradient of the whole drawing; the value is one and the same."""
    method, sample = toy("lcm", (1.0, 0.5)), batch()
    parameters, sampler = list(method.student.net.parameters()), method.sampler()
    found = {}
    for last in (True, False):
        term = RewardTerm(1.0, rewards(near(1.0)), RewardOptions(last_call=last))
        _, logs = Objective(method, [term]).loss(STUDENT, sample)
        found[last] = float(logs["term reward"]), torch.autograd.grad(logs["term reward"], parameters)
    x = sampler.walk(method.student, sample.noise, sample.cond, sample.fresh, 1)
    end = method.student.predict(x, torch.full((8,), 0.5), sample.cond).x0
    wanted = torch.autograd.grad(-near(1.0)(end, None).mean(), parameters)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    for through, last, true in zip(found[False][1], found[True][1], wanted, strict=True):
        torch.testing.assert_close(through, true, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(last, true, rtol=1e-2)


def test_several_rewards_are_added():
    method, sample = toy("dmd"), batch()
    one, two = near(1.0), lambda x, prompt: x.flatten(1).mean(1)
    values = [
        Objective(method, [RewardTerm(1.0, rewards(*each))]).loss(STUDENT, sample)[1]["term reward"].detach()
        for each in ((one,), (two,), (one, two))
    ]
    torch.testing.assert_close(values[0] + values[1], values[2])


@pytest.mark.parametrize("name", method_names())
def test_what_a_method_says_it_shows_it_shows(name):
    """``shows``: after any warm start, in a turn of the student, the parts of Loss that are told, with their graph and
    a gradient of the loss."""
    method = build(name)
    trained, calls = method.trained(), len(method.times)
    step = next(step for step in range(400, 9000) if trained[method.turn(step).network].draws_the_end(calls))
    turn = method.turn(step)
    found = method.loss(turn, batch_for(method, step=step))
    shown = {"sample": found.sample, "prediction": found.predicted and found.predicted.x0}
    for value in (shown[key] for key in method.shows):
        (own,) = torch.autograd.grad(found.value, value, retain_graph=True)
        assert bool(own.any())


def test_options_that_a_method_cannot_answer_are_refused():
    for name, options in (("dmd", {"of": "prediction"}), ("lcm", {"bounded": True})):
        with pytest.raises(UserError, match=r"terms\.reward_weight is 1 .* shows none: take lcm"):
            Objective(toy(name), [RewardTerm(1.0, rewards(near(0.0)), RewardOptions(**options))])
    method, sample = toy("lcm"), batch()
    objective = Objective(method, [RewardTerm(1.0, rewards(near(0.0)), RewardOptions(of="prediction"))])
    unnamed = replace(sample, pairs=replace(sample.pairs, prompt=None))
    with pytest.raises(UserError, match="captions are not the run's prompts"):
        objective.loss(STUDENT, unnamed)


TEXTS = nn.functional.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), dim=1)


def with_proxy(method, reward, weight=1.0, lr_ratio=2.0):
    options = RewardOptions(of="prediction")
    proxy = LatentReward((2, 1, 1), 6)
    term = LatentRewardTerm(
        weight, rewards(reward), options, proxy, lambda prompt: TEXTS[prompt], 1.0, lr_ratio
    )
    return Objective(method, [term]), proxy


def test_the_divergence_is_zero_where_differences_agree_and_alone_there():
    wanted = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    assert float(pairwise_divergence(wanted, wanted + 7.0).abs().max()) < 1e-6
    other = wanted.clone()
    other[0] += 0.5
    assert bool((pairwise_divergence(wanted, other) > 0.01).all())
    p, q = wanted[:2, 0].softmax(0), other[:2, 0].softmax(0)
    alone = pairwise_divergence(wanted[:2, :1], other[:2, :1])
    assert float(alone) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_the_proxy_learns_in_turns_of_its_own_and_stands_still_in_the_students():
    """Its turn moves it alone, from differences of the reward; in the student's turn the gradient is that of the proxy,
    which has none itself."""
    method, sample = toy("lcm"), batch()
    objective, proxy = with_proxy(method, near(1.0))
    assert [objective.turn(step).network for step in range(4)] == ["term reward", "student"] * 2
    assert objective.lr_ratio(objective.turn(0)) == 2.0 and shown_name("term reward") == "latent reward"
    objective.loss(objective.turn(0), sample)[0].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in proxy.parameters())
    assert all(p.grad is None for p in method.student.net.parameters())
    clear(method)
    objective.zero_grad(set_to_none=True)
    loss, logs = objective.loss(STUDENT, sample)
    loss.backward()
    assert all(p.grad is None for p in proxy.parameters())
    seen = method.loss(STUDENT, sample).predicted
    torch.testing.assert_close(
        logs["term reward"].detach(), -proxy(seen.x0, TEXTS[seen.prompt]).mean().detach()
    )


def test_the_proxy_comes_to_tell_better_from_worse():
    """Trained on {prediction, target, clean}, its differences become the reward's."""
    method = toy("lcm")

    def reward(x, prompt):
        return 0.5 * torch.tanh(x[:, 0, 0, 0]) * TEXTS[prompt, 0]

    objective, proxy = with_proxy(method, reward)
    optimizer = torch.optim.Adam(proxy.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(150):
        optimizer.zero_grad()
        loss, _ = objective.loss(Turn("term reward", step), batch(32, step))
        loss.backward()
        optimizer.step()
        first, last = first or float(loss), float(loss)
    assert last < 0.2 * first


def test_the_proxy_halves_latents_until_a_side_has_four_and_starts_from_its_shape_alone():
    sides = []
    for shape, strides in (
        ((4, 4, 4), [1, 1]),
        ((4, 5, 9), [1, 2, 1]),
        ((4, 9, 9), [1, 2, 2, 1]),
        ((4, 16, 12), [1, 2, 2, 1]),
        ((16, 64, 128), [1, 2, 2, 2, 2, 1]),
    ):
        own = LatentReward(shape, 6)
        torch.rand(3)
        again = LatentReward(shape, 6)
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))
        convolutions = [layer for layer in own.body if isinstance(layer, nn.Conv2d)]
        assert [each.stride[0] for each in convolutions] == strides
        assert all(each.kernel_size == (3, 3) and each.padding == (1, 1) for each in convolutions)
        norms = [layer for layer in own.body if isinstance(layer, nn.GroupNorm)]
        assert [each.num_groups for each in norms] == [8] * (len(strides) - 1)
        sides.append(min(own.body(torch.randn(2, *shape)).shape[2:]))
        one = nn.functional.normalize(torch.randn(2, 6), dim=1)
        found = own(torch.randn(2, *shape), one)
        assert found.shape == (2,) and bool((found.abs() <= 1 + 1e-5).all())
    assert sides == [4, 3, 3, 3, 4]
    latents = torch.randn(2, *shape)
    seen = nn.functional.normalize(own.head(own.body(latents).mean((2, 3))), dim=1)
    torch.testing.assert_close(own(latents, one), (seen * one).sum(1))


def test_the_proxys_loss_is_the_divergence_at_its_temperature_over_the_samples_that_are_judged():
    """A mean over a third of the samples, whose texts and latents hold no graph."""
    method, sample = toy("lcm"), batch(6)
    options = RewardOptions(of="prediction", share=1 / 3)
    proxy = LatentReward((2, 1, 1), 6)
    term = LatentRewardTerm(1.0, rewards(near(1.0)), options, proxy, lambda prompt: TEXTS[prompt], 0.5, 2.0)
    assert term.critic().follows and term.critic().extra is proxy
    seen = method.loss(STUDENT, sample).predicted
    shown = Shown(method, sample, None, method.loss(STUDENT, sample))
    loss = term.critic_loss(shown)
    kept, prompt = [each[[2, 5]].detach() for each in (seen.x0, *seen.others)], seen.prompt[[2, 5]]
    wanted = torch.stack([near(1.0)(each, prompt) for each in kept]) / 0.5
    found = torch.stack([proxy(each, TEXTS[prompt]) for each in kept])
    torch.testing.assert_close(loss, pairwise_divergence(wanted, found).sum() / 2)
    loss.backward()
    assert all(p.grad is None for p in method.student.net.parameters())


def test_a_proxy_reads_pictures_alone():
    with pytest.raises(UserError, match=r"reads latents \[C, H, W\], and this teacher's are \[16, 4\]"):
        LatentReward((16, 4), 6)


def test_a_share_is_of_the_whole_batch_also_where_parts_begin_between_and_its_value_a_mean():
    """Every third of six, in parts of two: the second part begins with the third sample."""
    told: list[Any] = []

    def reward(x, prompt):
        told.append(prompt.tolist())
        return 1.0 + prompt + 0 * x.flatten(1).sum(1)

    term = RewardTerm(1.0, rewards(reward), RewardOptions(share=1 / 3))
    method, whole = toy("lcm"), batch(6)
    shown = Shown(method, whole, None, method.loss(STUDENT, whole))
    assert float(term.value(shown).detach()) == pytest.approx(-(3 + 6) / 2)
    for part in whole.split(3):
        term.value(Shown(method, part, None, method.loss(STUDENT, part)))
    assert told == [[2, 5], [2], [5]]


def test_a_bound_is_of_whole_samples():
    x = torch.arange(24.0).view(2, 3, 2, 2)
    found = norms(x)
    assert found.shape == (2, 1, 1, 1)
    torch.testing.assert_close(found.flatten(), x.square().sum((1, 2, 3)).sqrt())


def test_rewards_tell_their_slopes_one_by_one_and_leave_no_graph():
    """In latents through the decoder, in pictures without it."""
    factors = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)
    each = (
        lambda images, prompt: images.square().sum((1, 2, 3)),
        lambda images, prompt: -images[:, 1].sum((1, 2)) * (1 + prompt),
    )
    own = Rewards(lambda x0: x0[:, :1] * factors, each)
    x0, prompt = torch.randn(2, 2, 3, 4, requires_grad=True), torch.tensor([0, 4])
    images = (x0[:, :1] * factors).detach()
    slopes = own.gradients(x0, prompt)
    assert slopes.shape == (2, 2, 2, 3, 4) and not slopes.requires_grad and not slopes[:, :, 1].any()
    torch.testing.assert_close(slopes[0, :, 0], 2 * 14 * x0[:, 0].detach())
    torch.testing.assert_close(slopes[1, :, 0], 2.0 * (1 + prompt).view(2, 1, 1).expand(2, 3, 4))
    scores, matter = own.seen(x0, prompt)
    assert scores.shape == (2, 2) and matter.shape == (2, 2, 3, 4)
    assert not scores.requires_grad and not matter.requires_grad
    torch.testing.assert_close(scores, torch.stack([reward(images, prompt) for reward in each]))
    torch.testing.assert_close(matter[0], 2 * images.abs().mean(1))
    torch.testing.assert_close(matter[1], ((1 + prompt) / 3).view(2, 1, 1).expand(2, 3, 4))
