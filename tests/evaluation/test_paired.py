"""Statistics of pictures beside those of the same noises: distances, their errors, and the gap that they close."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stepdistill.errors import UserError
from stepdistill.evaluation.paired import gaps_closed, paired
from stepdistill.evaluation.rows import HeldRows
from stepdistill.features.load import load_features
from stepdistill.metrics.frechet import frechet_distance_between
from stepdistill.metrics.frechet_error import paired_frechet_estimate
from stepdistill.metrics.kid import kernel_distance, paired_kernel_distance
from stepdistill.system.shipped import content_folder


@pytest.mark.parametrize("count", [64, 256])
def test_other_pictures_of_the_teachers_distribution_close_the_gap(count: int) -> None:
    """Embedded real images as the pictures of all three: student and teacher draw other ones of one distribution, the
    teacher with one step draws its own nearer to the mean. By the Frechet distance the student would be short of its
    teacher."""
    every = load_file(content_folder("eval") / "reference" / "emoji.safetensors")["features"]
    network, draws = load_features("emoji"), torch.Generator().manual_seed(0)
    kernel, frechet = [], []
    for _ in range(16):
        full, other = every[torch.randperm(len(every), generator=draws)[: 2 * count]].split(count)
        one = F.normalize(full + 0.5 * F.normalize(every.mean(0), dim=0), dim=1)
        tables = [
            HeldRows({"features": rows, "pixels": torch.zeros(count, 3, 1, 1)}) for rows in (full, other, one)
        ]
        student, teacher_one = (paired(rows, tables[0], network) for rows in tables[1:])
        kernel.append(gaps_closed({1: student}, teacher_one)["1"])
        assert student["fd"] is not None and teacher_one["fd"] is not None
        frechet.append(1 - student["fd"] / teacher_one["fd"])
    gaps = torch.tensor(kernel)
    assert abs(gaps.mean() - 1) < 3 * gaps.std() / 4 < 0.1
    assert torch.tensor(frechet).mean() == pytest.approx({64: 0.19, 256: 0.81}[count], abs=0.02)


def test_pairs_are_compared_in_pixels_and_in_features_and_errors_are_of_their_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(2, 40, 512, generator=draws)
    pixels = torch.randint(0, 256, (2, 40, 3, 4, 4), generator=draws, dtype=torch.uint8)
    one, other = (
        HeldRows({"features": rows, "pixels": seen}) for rows, seen in zip(features, pixels, strict=True)
    )
    network = load_features("emoji")
    found = paired(one, other, network)
    monkeypatch.setattr(network, "fd_scale", 100 * network.fd_scale)
    scaled = paired(one, other, network)
    for name in ("fd", "fd_se"):
        assert scaled[name] == pytest.approx(100 * float(found[name] or 0)) and found[name]
    cosines = (features[0] * features[1]).sum(1) / features[0].norm(dim=1) / features[1].norm(dim=1)
    apart = (pixels[0].double() - pixels[1].double()) / 255
    for name, values in (
        ("paired_distance", 1 - cosines),
        ("paired_rmse", apart.square().mean((1, 2, 3)).sqrt()),
    ):
        assert found[name] == pytest.approx(float(values.mean()), rel=1e-4)
        assert found[f"{name}_se"] == pytest.approx(float(values.std() / 40**0.5), rel=1e-3)


def test_no_gap_where_the_teachers_first_step_is_not_told_apart() -> None:
    student: dict[int, dict[str, float | None]] = {1: {"kid": 0.1}, 4: {"kid": -0.1}}
    assert gaps_closed(student, {"kid": 0.4, "kid_se": 0.19}) == pytest.approx({"1": 0.75, "4": 1.25})
    with pytest.raises(UserError, match=r"KID with one step is 0.4 ± 0.2, not told apart from 0"):
        gaps_closed(student, {"kid": 0.4, "kid_se": 0.2})


def test_the_paired_kernel_distance_is_unbiased_for_pairs_that_depend_on_each_other() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(40, 300, 4, generator=draws, dtype=torch.float64)
    y = 0.95 * x + (1 - 0.95**2) ** 0.5 * torch.randn(40, 300, 4, generator=draws, dtype=torch.float64)
    found = [paired_kernel_distance(a, b) for a, b in zip(x, y, strict=True)]
    values = torch.tensor([each.value for each in found])
    error = values.std() / 40**0.5
    assert values.mean().abs() < 3 * error
    assert 0.7 < torch.tensor([each.standard_error for each in found]).mean() / values.std() < 1.4
    # Where the other counts a picture with its own other, it is too small by as much as pairs are alike.
    others = torch.tensor([kernel_distance(a, b).value for a, b in zip(x, y, strict=True)])
    assert others.mean() < -5 * error
    assert paired_kernel_distance(x[0], x[0]).value == 0
    assert paired_kernel_distance(x[0, :3], y[0, :3]).standard_error > 0
    with pytest.raises(ValueError, match="at least 3 pairs, there are 2 and 2"):
        paired_kernel_distance(x[0, :2], y[0, :2])


@pytest.mark.parametrize("gamma", [None, 0.3])
def test_the_paired_kernel_distance_is_the_mean_over_unequal_pairs(gamma: float | None) -> None:
    """By the sum itself; the error by leaving each pair out in turn."""
    x, y = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b * (1 / 5 if gamma is None else gamma) + 1) ** 3)

    def mean(kept: list[int]) -> float:
        pairs = [(i, j) for i in kept for j in kept if i != j]
        return sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(
            pairs
        )

    found = paired_kernel_distance(x, y, gamma=gamma)
    assert found.value == pytest.approx(mean(list(range(7))))
    without = torch.tensor([mean([i for i in range(7) if i != left]) for left in range(7)])
    assert found.standard_error == pytest.approx(float((6 * without.var(correction=0)).sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("kept", "noise", "shift", "low", "high"),
    [
        (1.0, 0.01, 0.0, 0.9, 1.7),  # nearly equal pairs
        (1.0, 0.3, 0.1, 0.9, 1.7),
        (1.2, 0.5, 0.5, 0.7, 1.3),
        (0.0, 1.3, 0.5, 0.7, 1.3),  # other pictures, of another distribution
        (0.0, 1.0, 0.0, 0.9, 2.2),  # other pictures of one distribution: it errs upwards
    ],
)
def test_the_error_of_a_paired_frechet_distance_is_its_spread(
    kept: float, noise: float, shift: float, low: float, high: float
) -> None:
    """Leaving pictures out of one side alone would miss by 1,800 times in the first case and by 0.56 in the fourth."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(60, 256, 8, generator=draws, dtype=torch.float64)
    y = kept * x + noise * torch.randn(60, 256, 8, generator=draws, dtype=torch.float64) + shift
    found = [paired_frechet_estimate(a, b) for a, b in zip(x, y, strict=True)]
    spread = torch.tensor([each.value for each in found]).std()
    assert low < torch.tensor([each.standard_error for each in found]).mean() / spread < high
    assert found[0].value == pytest.approx(frechet_distance_between(x[0], y[0]))


def test_a_paired_frechet_distance_needs_three_pairs() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert paired_frechet_estimate(x, x + 1).value == pytest.approx(4)
    for a, b in ((x[:2], x[:2]), (x, x[:2])):
        with pytest.raises(ValueError, match=f"at least 3 pairs, there are {len(a)} and 2"):
            paired_frechet_estimate(a, b)
