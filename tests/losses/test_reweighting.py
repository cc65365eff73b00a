"""Weights of DMD's field by a reward: what they leave alone, and what they scale."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.reweighting import BOUND, FLOOR, WINDOW, Reweighting, spatial_weights
from stepdistill.methods.dmd import DMD
from stepdistill.testing.contract import batch_for, build

PROMPT = torch.arange(8)


def first(x, prompt):
    return x[:, 0].mean(dim=(1, 2))


def second(x, prompt):
    return -2 * x[:, 1].square().mean(dim=(1, 2))


def rewards(*each):
    return Rewards(lambda x0: x0, each)


def pictures(seed=0, size=4):
    return torch.randn(8, 2, size, size, generator=torch.Generator().manual_seed(seed))


def seen(kind="both", *each, steps=3, scale=2.0):
    """Weights after some steps."""
    found = Reweighting(kind, scale)
    for step in range(steps):
        found.weights(pictures(step), rewards(*each), PROMPT)
        found.update()
    return found


def test_before_it_has_seen_a_step_and_with_beta_zero_dmd_is_what_it_is():
    plain, other = build("dmd", (1.0,)), build("dmd", (1.0,))
    other.reweighting, other.rewards = Reweighting("reward", 2.0), rewards(first)
    batch = batch_for(plain)
    x = plain.generate(batch)
    assert torch.equal(plain.match(x, batch)[0], other.match(x, batch)[0])
    other.after_step(other.turn(0))
    assert not torch.equal(plain.match(x, batch)[0], other.match(x, batch)[0])
    other.reweighting.scale = 0.0
    assert torch.equal(plain.match(x, batch)[0], other.match(x, batch)[0])
    assert DMD.Options(reweight="both").needs == DMD.Options().needs | {"reward"}


def test_a_samples_field_grows_by_the_exponential_of_its_reward_up_to_a_bound():
    made = seen("reward", first)
    mean, square = made.moments[:, 0]
    deviation = (square - mean.square()).sqrt()
    x = 0.1 * pictures(7)
    weights = made.weights(x, rewards(first), PROMPT).flatten()
    raised = x.clone()
    raised[3, 0] += 0.2 * deviation
    ratio = made.weights(raised, rewards(first), PROMPT).flatten() / weights
    assert float(ratio[3]) == pytest.approx(math.exp(2.0 * 0.2), rel=1e-3)
    assert torch.equal(torch.cat([ratio[:3], ratio[4:]]), torch.ones(7))
    raised[3, 0] += 100
    assert float(made.weights(raised, rewards(first), PROMPT)[3]) == pytest.approx(math.exp(BOUND), rel=1e-5)


def test_spatial_weights_have_mean_one_and_a_floor_and_no_scale():
    saliency, ranks = torch.rand(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)), torch.randn(2, 8)
    weights = spatial_weights(saliency, ranks)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(8))
    torch.testing.assert_close(weights, spatial_weights(9 * saliency, ranks))
    ratio = weights.amin(dim=(1, 2, 3)) / weights.amax(dim=(1, 2, 3))
    torch.testing.assert_close(ratio, torch.full((8,), FLOOR))
    assert torch.equal(spatial_weights(torch.full((2, 8, 4, 4), 0.3), ranks), torch.ones(8, 1, 4, 4))


def test_the_weakest_reward_leads():
    saliency = torch.zeros(2, 1, 2, 2)
    saliency[0, 0, 0, 0] = saliency[1, 0, 1, 1] = 1.0
    weights = spatial_weights(saliency, torch.tensor([[-5.0], [5.0]]))
    assert weights[0, 0].argmax() == 0 and float(weights[0, 0, 0, 0]) > 5 * float(weights[0, 0, 1, 1])


def test_saliency_is_the_gradient_in_pixels_on_the_latents_grid():
    """Pictures of 8x8 of latents 4x4: what a reward looks at has the weight."""

    def corner(images, prompt):
        return images[:, :, :2, :2].mean(dim=(1, 2, 3))

    decode = Rewards(lambda x0: x0.repeat_interleave(2, 2).repeat_interleave(2, 3), (corner,))
    weights = Reweighting("saliency", 2.0).weights(pictures(), decode, PROMPT)
    assert weights.shape == (8, 1, 4, 4) and bool((weights[:, 0].flatten(1).argmax(1) == 0).all())
    assert bool((weights[:, 0, 0, 0] / weights[:, 0, 1, 1] > 0.99 / FLOOR).all())


def test_a_rise_of_one_reward_alone_is_held_against_the_samples():
    """Nothing before the window is full; nothing where both rise alike; half the deviation of the rises otherwise."""
    made = Reweighting("reward", 2.0)
    made.moments[1] = 1.0  # deviations of one
    rise = torch.arange(WINDOW) >= WINDOW // 2
    made.window[:, :2] = rise[:, None].float()
    made.steps.fill_(WINDOW)
    assert float(made.penalty(2)) == 0 and float(made.penalty(1)) == 0
    made.window[:, 1] = 0
    assert float(made.penalty(2)) == pytest.approx(0.25)
    made.steps.fill_(WINDOW - 1)
    assert float(made.penalty(2)) == 0


def test_all_parts_of_a_batch_have_one_scale():
    """What is seen moves the means after the step: parts sum to what the whole would have said."""
    whole, parts, x = Reweighting("both", 2.0), Reweighting("both", 2.0), pictures()
    whole.weights(x, rewards(first, second), PROMPT)
    for rows in (slice(0, 4), slice(4, 8)):
        parts.weights(x[rows], rewards(first, second), PROMPT[rows])
    for each in (whole, parts):
        each.update()
    torch.testing.assert_close(whole.moments, parts.moments)
    torch.testing.assert_close(whole.window, parts.window)
    assert int(parts.steps) == 1


def test_what_it_cannot_weigh_is_refused():
    with pytest.raises(UserError, match=r"options\.reweight is for latents \[C, H, W\]"):
        Reweighting("both", 2.0).weights(torch.zeros(2, 16, 4), rewards(first), PROMPT[:2])


def test_weights_over_a_whole_window_are_those_of_the_text():
    """Running means of decay 0.98 that begin at what the first step saw, and a penalty once 50 steps were seen."""
    made, kept, moments = Reweighting("reward", 0.7), [], torch.zeros(2, 2)
    for step in range(WINDOW + 10):
        x = (1 + 0.03 * step) * pictures(step) + 0.02 * step
        scores = torch.stack([first(x, PROMPT), second(x, PROMPT)])
        now = torch.stack([scores.mean(1), scores.square().mean(1)])
        moments = now if step == 0 else 0.98 * moments + 0.02 * now
        kept.append(scores.mean(1))
        assert step >= WINDOW or float(made.penalty(2)) == 0
        made.weights(x, rewards(first, second), PROMPT)
        made.update()
    deviation = (moments[1] - moments[0].square()).sqrt()
    rise = torch.stack(kept[-25:]).mean(0) - torch.stack(kept[-50:-25]).mean(0)
    penalty = 0.5 * (rise / deviation).std(correction=0)
    assert float(penalty) > 0.1
    torch.testing.assert_close(made.penalty(2), penalty, rtol=1e-4, atol=1e-6)
    x = pictures(99).requires_grad_()
    ranks = (torch.stack([first(x, PROMPT), second(x, PROMPT)]) - moments[0, :, None]) / deviation[:, None]
    found = made.weights(x, rewards(first, second), PROMPT)
    assert not found.requires_grad and found.shape == (8, 1, 1, 1)
    wanted = (0.7 * (ranks.mean(0) - penalty)).clamp(-BOUND, BOUND).exp().detach()
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-4, atol=1e-5)


def test_a_reward_that_never_moves_weighs_nothing():
    def still(x, prompt):
        return 0 * x[:, 0, 0, 0] + 1.0

    alone = seen("reward", still, steps=WINDOW + 1)
    assert torch.equal(alone.weights(pictures(3), rewards(still), PROMPT), torch.ones(8, 1, 1, 1))
    both = seen("reward", still, first, steps=WINDOW + 1)
    assert bool(both.weights(pictures(3), rewards(still, first), PROMPT).isfinite().all())


def test_eight_rewards_are_the_most_and_latents_need_not_be_square():
    assert seen("reward", *[first] * 8).weights(pictures(), rewards(*[first] * 8), PROMPT).shape == (
        8,
        1,
        1,
        1,
    )
    with pytest.raises(UserError, match=r"8 rewards at most; found \[2, 4, 4\] and 9"):
        Reweighting("reward", 1.0).weights(pictures(), rewards(*[first] * 9), PROMPT)
    wide = torch.randn(8, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert Reweighting("saliency", 1.0).weights(wide, rewards(second), PROMPT).shape == (8, 1, 4, 6)
