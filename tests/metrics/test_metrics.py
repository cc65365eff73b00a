"""The metrics against closed forms, direct sums and other implementations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.features.load import load_features
from stepdistill.features.resize import resize_clean
from stepdistill.metrics.clip_score import cosines
from stepdistill.metrics.cmmd import cmmd
from stepdistill.metrics.diversity import pairwise_diversity
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.mmd import KernelDistance
from stepdistill.metrics.prdc import Balls, coverage, density, precision, recall
from stepdistill.system.emoji import emoji_captions, emoji_images


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments.from_statistics(mean, covariance, 1000)


def test_frechet_distance_of_gaussians_on_shared_axes_is_the_sum_of_squared_differences() -> None:
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, 0.5])  # deviations, one of them zero
    mean = torch.tensor([0.3, -0.7, 2.0])
    rotation = torch.linalg.qr(normal(3, 3)).Q
    first = gaussian(mean, rotation @ torch.diag(a.double() ** 2) @ rotation.T)
    second = gaussian(torch.zeros(3), rotation @ torch.diag(b.double() ** 2) @ rotation.T)
    expected = float(mean.square().sum() + (a - b).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_of_gaussians_on_different_axes() -> None:
    # For 2 x 2, tr M^1/2 = (tr M + 2 det(M)^1/2)^1/2 with M = A B.
    a, b = normal(2, 2, seed=1), normal(2, 2, seed=2)
    a, b = a @ a.T, b @ b.T
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2)
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected, abs=1e-10)
    assert frechet_distance(gaussian(zero, b), gaussian(zero, a)) == pytest.approx(expected, abs=1e-10)


def test_moments_depend_on_neither_the_split_nor_the_order_of_merging() -> None:
    features = normal(500, 24).float() + 5
    whole = Moments.of(features)
    for sizes in ([500], [1, 499], [100] * 5, [7] * 71 + [3]):
        parts = [Moments.of(part) for part in torch.split(features, sizes)]
        streamed = Moments.empty(24)
        for part in torch.split(features, sizes):
            streamed.add(part)
        merged = Moments.empty(24)
        for piece in reversed(parts):
            merged = piece.merge(merged)
        for moments in (streamed, merged):
            assert moments.count == 500
            torch.testing.assert_close(moments.mean, whole.mean, rtol=0, atol=1e-10)
            torch.testing.assert_close(moments.covariance, whole.covariance, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole.covariance, torch.cov(features.double().T), rtol=0, atol=1e-10)


def test_statistics_survive_the_round_trip_through_mean_and_covariance() -> None:
    moments = Moments.of(normal(50, 8) + 3)
    again = Moments.from_statistics(moments.mean, moments.covariance, moments.count)
    torch.testing.assert_close(again.outer, moments.outer, rtol=1e-12, atol=1e-12)


def test_frechet_distance_equals_scipy_and_clean_fid() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = normal(400, 32), normal(300, 32, seed=1) @ normal(32, 32, seed=2) * 0.3 + 0.2
    a, b = Moments.of(x), Moments.of(y)
    ours = frechet_distance(a, b)
    root = np.real(linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
    theirs = (
        float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
        - 2 * root.trace()
    )
    assert ours == pytest.approx(theirs, rel=1e-9)
    fid = pytest.importorskip("cleanfid.fid")
    arrays = [t.numpy() for t in (a.mean, a.covariance, b.mean, b.covariance)]
    try:
        theirs = fid.frechet_distance(*arrays)
    except TypeError:
        pytest.skip("this scipy has no sqrtm(disp=), which clean-fid 0.1.35 calls")
    assert ours == pytest.approx(float(theirs), rel=1e-9)


@pytest.mark.parametrize("count", [20, 64, 200])
def test_distance_from_features_equals_the_one_from_moments(count: int) -> None:
    features, reference = normal(count, 64), Moments.of(normal(300, 64, seed=1) * 1.2 + 0.1)
    expected = frechet_distance(Moments.of(features), reference)
    assert frechet_distance_of_features(features, reference) == pytest.approx(expected, abs=2e-5)


def test_distance_of_fewer_features_than_dimensions_to_themselves_is_zero() -> None:
    features = normal(20, 64)
    assert abs(frechet_distance_of_features(features, Moments.of(features))) < 1e-6


def test_kernel_distance_equals_the_sum_over_pairs() -> None:
    x, y = normal(7, 5), normal(6, 5, seed=1)

    def k(u: Tensor, v: Tensor) -> float:
        return float((u @ v / 5 + 1) ** 3)

    within_x = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_y = sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / (6 * 5)
    across = sum(k(u, v) for u in x for v in y) / (7 * 6)
    for block in (1, 4, 1024):
        value = kernel_distance(x, y, block=block).value
        assert value == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kernel_distance_equals_torchmetrics() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(60, 16), normal(60, 16, seed=1) + 0.2
    assert kernel_distance(x, y).value == pytest.approx(float(kid.poly_mmd(x, y)), rel=1e-9)


def test_standard_error_equals_the_jackknife_done_by_leaving_drawn_images_out() -> None:
    x, y = normal(9, 4), normal(8, 4, seed=1) + 0.5
    without = torch.tensor([kernel_distance(torch.cat([x[:i], x[i + 1 :]]), y).value for i in range(9)])
    expected = math.sqrt(8 * without.double().var(correction=0))
    assert kernel_distance(x, y).standard_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
@pytest.mark.parametrize("shift", [0.1, 0.5])
def test_the_error_of_a_kernel_distance_is_its_spread_over_other_seeds(
    distance: Callable[[Tensor, Tensor], KernelDistance], shift: float
) -> None:
    """200 drawn images beside 100 real ones that stay. With the sampling of those it would be 1.3 to 2.1 times that."""
    real = normal(100, 6)
    draws = [distance(normal(200, 6, seed=1 + i) + shift, real) for i in range(80)]
    ratio = sum(d.standard_error for d in draws) / 80 / float(torch.tensor([d.value for d in draws]).std())
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kernel_distance_is_unbiased(shift: float) -> None:
    draws = [
        kernel_distance(normal(40, 3, seed=2 * i), normal(50, 3, seed=2 * i + 1) + shift) for i in range(400)
    ]
    values = torch.tensor([d.value for d in draws])
    error_of_mean = float(values.std()) / math.sqrt(len(draws))
    # x, x' ~ N(0, I), y, y' ~ N(m, I), k = (x.y / 3 + 1)^3: E k = 1 + 3 E(u) + 3 E(u^2) + E(u^3), u the inner product
    # over 3. Only terms with both means survive the difference: see the moments of u below.
    square = 3 * shift**2  # |m|^2
    e1, e2, e3 = square, square**2 + 2 * square + 3, square**3 + 6 * square**2 + 15 * square
    within_y = 1 + 3 * e1 / 3 + 3 * e2 / 9 + e3 / 27
    within_x = 1 + 3 * 3 / 9
    across = 1 + 3 * (square + 3) / 9
    expected = within_x + within_y - 2 * across
    assert abs(float(values.mean()) - expected) < 3 * error_of_mean


def test_clip_score_is_the_cosine_of_each_pair() -> None:
    x, y = normal(10, 4), normal(10, 4, seed=1)
    direct = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    torch.testing.assert_close(cosines(x, y), direct.double(), rtol=0, atol=1e-12)


def test_clean_resize_equals_pillow() -> None:
    from PIL import Image

    pixels = torch.from_numpy(emoji_images()[40:41]).permute(0, 3, 1, 2)  # [1, 3, 32, 32]
    ours = resize_clean(pixels, 299)[0]
    channels = [Image.fromarray(channel.numpy().astype(np.float32), mode="F") for channel in pixels[0]]
    theirs = np.stack(
        [np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    )
    assert np.abs(ours.numpy() - theirs).max() < 3e-3


@pytest.mark.slow
def test_embedded_images_and_captions_match() -> None:
    images, captions = emoji_images(), emoji_captions()
    assert images.shape == (3781, 32, 32, 3) and images.dtype == np.uint8 and len(captions) == 3781
    assert not (images == 255).all((1, 2, 3)).any()  # no tile of the padding
    network = load_features("emoji")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    seen = torch.cat([network.images(part) for part in torch.split(pixels, 500)])
    read = torch.cat([network.texts(captions[i : i + 500]) for i in range(0, 3781, 500)])
    assert seen.shape == read.shape == (3781, 64)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(3781))
    assert float(cosines(seen, read).mean()) == pytest.approx(0.903, abs=1e-3)


def near(real: Tensor, drawn: Tensor, nearest: int, **options: int) -> tuple[float, float, float, float]:
    balls = Balls.between(real, drawn, nearest, **options)
    return precision(balls), recall(balls), density(balls), coverage(balls)


def line(*points: float) -> Tensor:
    return torch.tensor(points)[:, None]


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_neighbour_metrics_of_known_balls(block: int) -> None:
    """Real 0, 1, ..., 9 and drawn 0, 1, ..., 4 and 20, balls to the nearest neighbour, edges included.

    Real balls have radius 1 and hold 2, 3, 3, 3, 3 of the drawn ones in turn, and none hold 20. The drawn balls of
    radius 1 hold 0 to 5, the one at 20 reaches back to 4 and holds all from 4 on: recall is flattered by that outlier,
    coverage is not. Only the balls of 0 to 5 hold a drawn point.
    """
    real, drawn = line(*range(10)), line(0, 1, 2, 3, 4, 20)
    found = near(real, drawn, 1, block=block)
    assert found == pytest.approx((5 / 6, 1.0, 14 / 6, 0.6), abs=1e-12)
    assert near(real, drawn[:5], 1, block=block) == pytest.approx((1.0, 0.6, 14 / 5, 0.6), abs=1e-12)
    # To the second nearest: radius 1 inside, 2 at the ends, so that the ball of 0 holds 0, 1, 2.
    assert near(real, drawn[:5], 2, block=block)[2] == pytest.approx((2 + 3 + 4 + 3 + 3) / (2 * 5), abs=1e-12)


def test_of_a_set_with_itself_all_is_found_and_density_counts_the_centre() -> None:
    """Every ball holds its centre and k others: density is (k + 1) / k, the rest 1."""
    x = normal(200, 6)
    for k in (1, 5):
        assert near(x, x, k) == pytest.approx((1.0, 1.0, (k + 1) / k, 1.0), abs=1e-12)
    assert near(x, x + 100, 5) == (0.0, 0.0, 0.0, 0.0)


def test_precision_and_recall_change_places_with_the_sets() -> None:
    real, drawn = normal(150, 4), 0.7 * normal(120, 4, seed=1) + 0.4
    forth, back = near(real, drawn, 3), near(drawn, real, 3)
    assert (forth[0], forth[1]) == (back[1], back[0]) and 0 < forth[1] < 1


def test_density_and_coverage_of_one_distribution_have_the_expectations_of_their_ranks() -> None:
    """For M real and N drawn points of any one law: E density = 1, and a ball holds no drawn point with probability
    (M-1)...(M-k) / ((M+N-1)...(M+N-k)), the chance that the k nearest of all others are real."""
    m, n, k = 30, 20, 3
    found = torch.tensor(
        [near(normal(m, 2, seed=2 * i), normal(n, 2, seed=2 * i + 1).double(), k) for i in range(400)],
        dtype=torch.float64,
    )
    missed = math.prod((m - j) / (m + n - j) for j in range(1, k + 1))
    for column, expected in ((2, 1.0), (3, 1 - missed)):
        error = float(found[:, column].std()) / math.sqrt(len(found))
        assert abs(float(found[:, column].mean()) - expected) < 3 * error


def test_a_lost_mode_is_seen_by_recall_and_coverage_and_not_by_precision() -> None:
    real = torch.cat([normal(100, 2), normal(100, 2, seed=1) + 50])
    found = near(real, normal(200, 2, seed=2), 5)
    assert (
        found[0] > 0.9
        and found[1] == pytest.approx(0.5, abs=0.05)
        and found[3] == pytest.approx(0.5, abs=0.05)
    )


def test_balls_without_a_group_are_those_of_the_others() -> None:
    """Radii included: without the third of them that holds most of its neighbours, a ball reaches much further."""
    real, drawn = normal(60, 2), normal(40, 2, seed=1)
    drawn[::3] = 0.01 * normal(14, 2, seed=2)  # one group is a heap
    for block in (7, 1024):
        found = Balls.between(real, drawn, 3, groups=3, block=block)
        for group in range(3):
            alone = Balls.between(real, drawn[torch.arange(40) % 3 != group], 3)
            assert torch.equal(found.covered_without[group], alone.covered)
            assert torch.equal(found.reached_without[group], alone.reached)
    assert Balls.between(real, drawn, 3).covered_without.shape == (0, 60)


def test_balls_need_more_features_than_neighbours() -> None:
    with pytest.raises(ValueError, match="need more features than that"):
        Balls.between(normal(5, 2), normal(50, 2), 5)


def test_diversity_is_the_mean_over_pairs() -> None:
    x = 3 * normal(6, 5, 8)
    unit = x / x.norm(dim=2, keepdim=True)
    each = [sum(1 - float(u[i] @ u[j]) for i in range(5) for j in range(5) if i != j) / 20 for u in unit]
    found = pairwise_diversity(x)
    assert found.value == pytest.approx(sum(each) / 6, abs=1e-12)
    assert found.standard_error == pytest.approx(float(torch.tensor(each).std()) / math.sqrt(6), abs=1e-6)


def test_a_direction_without_variance_changes_no_distance() -> None:
    """More images than dimensions, and a covariance that has no Cholesky factor."""
    x, y = normal(50, 3), 1.5 * normal(60, 3, seed=1) + 0.2
    wider = [torch.cat([side, torch.zeros(len(side), 1)], 1) for side in (x, y)]
    plain, flat = (frechet_distance(*(Moments.of(side) for side in pair)) for pair in ((x, y), wider))
    assert flat == pytest.approx(plain, rel=1e-6) and plain > 0.1


def test_diversity_of_one_image_is_zero_of_opposites_two_and_of_a_basis_one() -> None:
    basis = torch.eye(4)[None]
    assert pairwise_diversity(basis).value == pytest.approx(1.0)
    assert pairwise_diversity(basis[:, :1].repeat(3, 5, 1)).value == pytest.approx(0.0, abs=1e-12)
    assert pairwise_diversity(torch.stack([basis[0, :1], -basis[0, :1]], 1)).value == pytest.approx(2.0)
    assert pairwise_diversity(basis).standard_error == 0.0
    two = pairwise_diversity(torch.stack([basis[0, :2], basis[0, :1].expand(2, -1)]))  # 1 and 0
    assert two.standard_error == pytest.approx(0.5)
    with pytest.raises(ValueError, match="2 samples of a prompt"):
        pairwise_diversity(basis[:, :1])
