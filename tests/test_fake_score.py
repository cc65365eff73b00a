"""What the methods with a fake score share: how it follows, where it is compared, and every weight of their losses."""

from __future__ import annotations

import pytest
import torch
from table_toy import TABLE, eps_teacher
from torch import nn
from toy import SHAPE, toy_batch

from stepdistill.fake_score import FakeScore, FakeScoreOptions

BINS = [(k / 5, (k + 1) / 5) for k in range(5)]


# --- how the fake network follows --------------------------------------------------------------------------------


def errors(denoiser, x):
    """Mean squared error of x0 on samples x [B, 2, 1, 1] noised to t uniform in each of five bins."""
    generator, found = torch.Generator().manual_seed(5), []
    for low, high in BINS:
        t = low + (high - low) * torch.rand(len(x), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            said = denoiser.predict(TABLE.sample(x, eps, t), t, toy_batch(1).cond).x0
        found.append(float((said - x).square().mean()))
    return found


@pytest.mark.parametrize("kind", ["x0", "output"])
def test_a_fake_network_with_an_eps_head_follows_at_all_noise_levels_by_its_loss_in_x0(kind):
    """After 100 updates on samples of N(0.5, 0.3^2) it errs less than the teacher, which does not know them, in each of
    five bins of t. By its loss in eps, which weighs it by 1 / 213 at t = 1, it errs more in the noisiest."""
    teacher = eps_teacher()
    fake = FakeScore(teacher)
    optimizer = torch.optim.Adam(fake.net.parameters(), lr=1e-3)
    for step in range(100):
        batch = toy_batch(64, step)
        optimizer.zero_grad()
        fake.denoising_loss(0.5 + 0.3 * batch.noise, batch, kind).backward()
        nn.utils.clip_grad_norm_(fake.net.parameters(), 10.0)
        optimizer.step()
    x = 0.5 + 0.3 * torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(4))
    ours, theirs = errors(fake, x), errors(teacher.denoiser, x)
    better = [own < 0.95 * other for own, other in zip(ours, theirs, strict=True)]
    assert better == ([True] * 5 if kind == "x0" else [True] * 4 + [False]), (ours, theirs)


def test_the_two_losses_are_one_error_in_two_units():
    """On a table (x0_said - x0) = -(sigma / alpha) (eps_said - eps), sample by sample."""
    teacher, batch = eps_teacher(), toy_batch(1, 3)
    fake, x = FakeScore(teacher), 0.5 * batch.noise
    alpha, sigma = TABLE.alpha_sigma(batch.draws.uniform("fake t"))
    by_x0, by_eps = (float(fake.denoising_loss(x, batch, kind).detach()) for kind in ("x0", "output"))
    assert by_x0 == pytest.approx(float((sigma / alpha) ** 2) * by_eps, rel=1e-3)


# --- where the scores are compared -------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "scale"), [(None, 7.5), (0.0, 0.0), (1.0, 1.0), (1.25, 1.25)])
def test_score_guidance_is_that_of_the_pairs_only_where_none_is_given(given, scale):
    assert FakeScoreOptions(guidance=7.5, score_guidance=given).score_scale == scale
