"""Distances of pictures of several values a side, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from stepdistill.losses.distances import distance, elementwise_huber, mean_size, pseudo_huber, rms, robust

GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(5, 2, 3, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
R = A - B
SQUARES = R.square().sum((1, 2, 3))
"""Of each of five samples of 18 values."""

EACH = {
    "l2": SQUARES / 18,
    "l1": R.abs().sum((1, 2, 3)) / 18,
    "huber": ((SQUARES + (0.00054 * 18) ** 2).sqrt() - 0.00054 * 18) / 18,
}


@pytest.mark.parametrize("name", EACH)
def test_a_distance_is_a_mean_over_samples_as_each_weighs(name):
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(distance(A, B, name), EACH[name].mean())
    torch.testing.assert_close(distance(A, B, name, weight), (weight * EACH[name]).mean())


@pytest.mark.parametrize("c", [0.0, 0.5])
def test_the_pseudo_huber_distance_has_one_norm_for_a_sample_and_no_slope_at_0(c):
    wanted = (SQUARES + c**2 * 18).sqrt() - c * 18**0.5
    torch.testing.assert_close(pseudo_huber(R, c), wanted)
    zero = torch.zeros_like(R, requires_grad=True)
    (slope,) = torch.autograd.grad(pseudo_huber(zero, c).sum(), zero)
    assert not bool(slope.any())


def test_the_huber_distance_of_lcms_code_is_of_each_value():
    torch.testing.assert_close(elementwise_huber(R, 0.3), ((R.square() + 0.09).sqrt() - 0.3).mean())


def test_the_robust_one_has_twice_a_roots_slope():
    size, c = SQUARES / 18, 0.7
    assert torch.equal(robust(1e-3 * R), robust(1e-3 * R, 1e-3))
    torch.testing.assert_close(robust(R, c), size / (size + c**2).sqrt())
    leaf = R.clone().requires_grad_()
    (slope,) = torch.autograd.grad(robust(leaf, c).sum(), leaf)
    (wanted,) = torch.autograd.grad(2 * (leaf.square().flatten(1).mean(1) + c**2).sqrt().sum(), leaf)
    torch.testing.assert_close(slope, wanted)


def test_what_is_for_the_log_holds_no_graph():
    for size, wanted in ((rms, (SQUARES.sum() / 90).sqrt()), (mean_size, R.abs().sum() / 90)):
        found = size(R.clone().requires_grad_())
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted)
