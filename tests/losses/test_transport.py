"""Entropic transport between clouds of tokens, against closed forms and plain Sinkhorn in float64."""

from __future__ import annotations

import pytest
import torch

from stepdistill.losses.transport import (
    displacement,
    from_tokens,
    places,
    sinkhorn,
    squared_distances,
    tokens,
    transported,
)


def clouds(n=6, m=6, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda count: torch.randn(2, count, channels, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(n), make(m)


def test_the_plan_is_that_of_plain_sinkhorn():
    """u <- 1 / n / (K v), v <- 1 / m / (K^T u), T = diag(u) K diag(v)."""
    a, b = clouds(5, 7)
    cost, entropy = squared_distances(a, b), torch.full((2, 1, 1), 0.7, dtype=torch.float64)
    kernel = (-cost / entropy).exp()
    u, v = torch.ones(2, 5, 1, dtype=torch.float64), torch.ones(2, 7, 1, dtype=torch.float64)
    for _ in range(50):
        u = 1 / 5 / (kernel @ v)
        v = 1 / 7 / (kernel.transpose(1, 2) @ u)
    torch.testing.assert_close(sinkhorn(cost, entropy, 50), u * kernel * v.transpose(1, 2), rtol=0, atol=1e-9)


def test_masses_are_uniform():
    a, b = clouds(5, 7)
    plan = sinkhorn(squared_distances(a, b), torch.full((2, 1, 1), 1.0, dtype=torch.float64), 200)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 7), 1 / 7, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(2), torch.full((2, 5), 1 / 5, dtype=torch.float64))


def test_the_displacement_is_half_the_gradient_of_the_entropic_cost():
    """d/da_i (<T, D> + eps <T, log T>) at the best T is 2 sum_j T_ij (a_i - b_j): the plan needs no gradient."""
    a, b = clouds(4, 4)
    entropy = torch.full((2, 1, 1), 0.5, dtype=torch.float64)

    def value(a):
        cost = squared_distances(a, b)
        plan = sinkhorn(cost, entropy, 2000)
        return (plan * cost + entropy * torch.special.xlogy(plan, plan)).sum()

    step, moved = 1e-5, a.clone()
    moved[0, 1, 2] += step
    back = a.clone()
    back[0, 1, 2] -= step
    slope = (value(moved) - value(back)) / (2 * step)
    found = displacement(sinkhorn(squared_distances(a, b), entropy, 2000), a, b)
    assert float(2 * found[0, 1, 2] / 4) == pytest.approx(float(slope), rel=1e-6)


def test_the_gradient_of_what_was_transported_at_a_fixed_plan_is_twice_the_displacement():
    a, b = clouds()
    plan = sinkhorn(squared_distances(a, b), torch.full((2, 1, 1), 0.5, dtype=torch.float64), 100)
    a.requires_grad_(True)
    (slope,) = torch.autograd.grad(transported(plan, a, b).sum(), a)
    torch.testing.assert_close(slope, 2 * displacement(plan, a.detach(), b))


def test_a_shifted_cloud_is_moved_by_the_shift():
    """b = a + c with sharp plans: whatever the order of b's tokens, each token of a is to move by c."""
    a, _ = clouds()
    c = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    b = (a + c)[:, torch.randperm(6, generator=torch.Generator().manual_seed(1))]
    found = displacement(
        sinkhorn(squared_distances(a, b), torch.full((2, 1, 1), 1e-3, dtype=torch.float64), 500), a, b
    )
    torch.testing.assert_close(found, (-c).expand_as(a), rtol=0, atol=1e-6)


def test_tokens_are_places_and_frames_are_clouds_of_their_own():
    picture, video = torch.arange(24.0).view(1, 2, 3, 4), torch.arange(96.0).view(2, 3, 4, 2, 2)
    assert tokens(picture).shape == (1, 12, 2) and tokens(video).shape == (8, 4, 3)
    assert torch.equal(tokens(picture)[0, 5], picture[0, :, 1, 1])
    assert torch.equal(tokens(video)[5, 2], video[1, :, 1, 1, 0])
    assert torch.equal(from_tokens(tokens(picture), picture), picture)
    assert torch.equal(from_tokens(tokens(video), video), video)


def test_places_follow_the_tokens():
    where = places(torch.zeros(1, 2, 3, 2))
    assert where.tolist() == [[0, 0], [0, 1], [0.5, 0], [0.5, 1], [1, 0], [1, 1]]
    assert places(torch.zeros(1, 2, 1, 1)).tolist() == [[0, 0]]
