"""Frechet distance at any N, the Inception of FID, resizes, and the metrics that go with them, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.suite import load_suite
from stepdistill.features.inception import STATE_SHA256, check_public
from stepdistill.features.inception_layers import shapes
from stepdistill.features.inception_network import Inception, random_state
from stepdistill.features.load import features_sha256, load_features
from stepdistill.features.own_module import ModuleFeatures
from stepdistill.features.resize import RESIZES, resize
from stepdistill.metrics import frechet
from stepdistill.metrics.aesthetic import load_aesthetic_head
from stepdistill.metrics.cmmd import cmmd
from stepdistill.metrics.fid_infinity import fid_infinity
from stepdistill.metrics.frechet import (
    Moments,
    frechet_distance,
    frechet_distance_between,
    frechet_distance_of_features,
)
from stepdistill.metrics.frechet_error import frechet_estimate
from stepdistill.metrics.inception_score import inception_score
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.pick_score import pick_scores
from stepdistill.metrics.sample_size import too_few
from stepdistill.metrics.sfid import sfid
from stepdistill.metrics.standard_errors import jackknife, of_mean


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets(n: int, m: int, dimension: int = 48) -> tuple[Tensor, Tensor]:
    scales = torch.logspace(0, -1.5, dimension, dtype=torch.float64)
    x = (normal(n, dimension) * scales) @ normal(dimension, dimension, seed=2)
    y = (normal(m, dimension, seed=1) * scales) @ normal(dimension, dimension, seed=3)
    return x.relu(), 1.2 * y.relu() + 0.1


def by_scipy(x: Tensor, y: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (np.cov(side.numpy(), rowvar=False) for side in (x, y))
    root = np.real(linalg.sqrtm(a @ b))
    return float((x.mean(0) - y.mean(0)).square().sum()) + float(
        np.trace(a) + np.trace(b) - 2 * np.trace(root)
    )


def test_every_way_to_the_distance_equals_scipys_root_to_1e_8_where_covariances_have_full_rank() -> None:
    x, y = sets(300, 200)
    expected = by_scipy(x, y)
    ways = (
        frechet_distance(Moments.of(x), Moments.of(y)),
        frechet_distance_of_features(x, Moments.of(y)),
        frechet_distance_between(x, y),
    )
    assert ways == pytest.approx([expected] * 3, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 24), (24, 40), (40, 300), (300, 12)])
def test_with_fewer_features_than_dimensions_all_ways_agree_to_1e_8(n: int, m: int) -> None:
    """scipy's root of a singular product is only good to 1e-6 here; the three ways share no factorisation."""
    x, y = sets(n, m)
    expected = frechet_distance_between(x, y)
    assert frechet_distance_of_features(x, Moments.of(y)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-8)
    assert by_scipy(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [5, 20, 48, 49, 200])
def test_a_set_is_at_distance_zero_from_itself(n: int) -> None:
    x, _ = sets(n, 2)
    moments = Moments.of(x)
    size = float(moments.covariance.trace())
    for value in (
        frechet_distance(moments, moments),
        frechet_distance_of_features(x, moments),
        frechet_distance_between(x, x),
    ):
        assert abs(value) < 1e-9 * size


def test_dimensions_that_never_move_add_only_their_distance() -> None:
    """Dead features make both covariances singular, however many images there are."""
    x, y = sets(300, 200)
    expected = frechet_distance(Moments.of(x), Moments.of(y)) + 3 * 0.25
    wider = [torch.cat([side, torch.full((len(side), 3), dead)], 1) for side, dead in ((x, 1.0), (y, 0.5))]
    assert frechet_distance(*(Moments.of(side) for side in wider)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_between(*wider) == pytest.approx(expected, rel=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets(300, 200)
    expected = frechet_distance(Moments.of(x), Moments.of(y))
    monkeypatch.setattr(frechet, "BLOCK", 7)
    torch.testing.assert_close(Moments.of(x).outer, x.T @ x, rtol=1e-13, atol=0)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-12)


def test_distances_need_two_features_of_one_dimension() -> None:
    x, y = sets(5, 5)
    with pytest.raises(ValueError, match="at least 2 features"):
        frechet_distance_between(x[:1], y)
    with pytest.raises(ValueError, match="48 and 47"):
        frechet_distance_between(x, y[:, 1:])


def test_fid_infinity_is_flat_where_fid_is_not() -> None:
    """Sets of one law as the reference's: FID falls like 1/N, FID-infinity stays within its error of 0."""
    dimension = 8
    unit = Moments.from_statistics(torch.zeros(dimension), torch.eye(dimension), 1_000_000)
    plain: list[float] = []
    for step, count in enumerate((240, 960, 3840)):
        draws = [normal(count, dimension, seed=100 * step + i) for i in range(20)]
        plain.append(np.mean([frechet_distance(Moments.of(x), unit) for x in draws]))
        found = [fid_infinity(x, unit) for x in draws]
        values = np.array([f.value.value for f in found])
        error = values.std(ddof=1) / math.sqrt(len(values))
        # Parts of 40 images in 8 dimensions still bend the line by a twentieth of the distance.
        assert abs(values.mean()) < 3 * error + 0.06 * plain[-1]
        assert np.mean([f.slope for f in found]) == pytest.approx(plain[-1] * count, rel=0.15)
    assert plain[0] > 3.5 * plain[1] > 12 * plain[2]


def test_fid_infinitys_error_is_the_spread_over_sets() -> None:
    unit = Moments.from_statistics(torch.ones(4), 2 * torch.eye(4), 1_000_000)
    found = [fid_infinity(normal(240, 4, seed=i), unit, groups=10).value for i in range(25)]
    spread = float(np.std([f.value for f in found], ddof=1))
    assert 0.6 < np.mean([f.standard_error for f in found]) / spread < 1.6
    with pytest.raises(ValueError, match="at least 12 images"):
        fid_infinity(normal(11, 4), unit)
    least, again, other = (
        fid_infinity(normal(12, 4), unit, **seed) for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert least.sizes == (2, 3, 4, 6, 12) and least.value.standard_error == 0
    assert least == again != other


@pytest.mark.parametrize(
    "count", [36, 72], ids=["of fewer images than their moments have numbers", "of more"]
)
def test_fid_infinity_is_the_end_of_a_line_through_the_parts_of_one_order(count: int) -> None:
    reference = Moments.from_statistics(torch.full((8,), 0.3), 1.5 * torch.eye(8), 1_000_000)
    features = normal(count, 8)
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    distances = [
        np.mean([frechet_distance(Moments.of(part), reference) for part in shuffled.chunk(parts)])
        for parts in (6, 4, 3, 2, 1)
    ]
    slope, end = np.polyfit([parts / count for parts in (6, 4, 3, 2, 1)], distances, 1)
    found = fid_infinity(features, reference)
    assert found.distances == pytest.approx(distances, rel=1e-6)
    assert (found.value.value, found.slope) == pytest.approx((end, slope), rel=1e-5)


def test_cmmd_equals_the_sum_over_pairs_and_the_kernels_bias_is_as_stated() -> None:
    x, y = normal(9, 6), normal(7, 6, seed=1) + 0.5
    u, v = (side / side.norm(dim=1, keepdim=True) for side in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-torch.cdist(a, b).square() / 200).mean())

    expected = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
    for block in (2, 1024):
        assert cmmd(3 * x, y, block=block).value == pytest.approx(expected, rel=1e-9)
    bias = cmmd(x, y).value - cmmd(x, y, unbiased=True).value
    cosines = [float((s @ s.T).sum() - len(s)) / (len(s) * (len(s) - 1)) for s in (u, v)]
    assert bias == pytest.approx(
        sum(10 * (1 - c) / len(s) for c, s in zip(cosines, (u, v), strict=True)), rel=0.02
    )


def test_kid_and_unbiased_cmmd_have_mean_zero_over_200_draws_of_one_law() -> None:
    for metric in (kernel_distance, lambda x, y: cmmd(x, y, unbiased=True)):
        values = np.array(
            [
                metric(normal(30, 4, seed=2 * i) + 0.3, normal(20, 4, seed=2 * i + 1) + 0.3).value
                for i in range(200)
            ]
        )
        assert abs(values.mean()) < 3 * values.std(ddof=1) / math.sqrt(200)


def test_inception_score_of_certain_classes_is_their_number_and_of_equal_images_one() -> None:
    certain = torch.full((60, 12), -1e4)
    certain[torch.arange(60), torch.arange(60) % 6] = 0
    for splits in (1, 5):
        found = inception_score(certain, splits=splits)
        assert found.value == pytest.approx(6.0, rel=1e-12) and found.deviation == pytest.approx(0, abs=1e-12)
    assert inception_score(torch.ones(20, 12)).value == pytest.approx(1.0, rel=1e-12)
    # Two images of two classes with probability p and 1 - p: log IS = log 2 - H(p).
    p = 0.8
    two = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert inception_score(two, splits=1).value == pytest.approx(2 / math.exp(entropy), rel=1e-12)
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(two)
    parts = normal(23, 5).tensor_split([7, 15])  # 23 in three, in their order
    each = torch.tensor([inception_score(part, splits=1).value for part in parts])
    found = inception_score(torch.cat(parts), splits=3)
    assert found.value == pytest.approx(float(each.mean()))
    assert found.deviation == pytest.approx(float(each.std(correction=0)), rel=1e-5)


def test_pick_score_is_the_scaled_cosine() -> None:
    images, texts = normal(6, 5), normal(6, 5, seed=1)
    found = pick_scores(images, texts, 100.0)
    torch.testing.assert_close(found, 100 * torch.cosine_similarity(images, texts))


def test_an_aesthetic_head_is_its_chain_of_linear_layers(tmp_path: Path) -> None:
    """Names and shape of the chain as in LAION's file: linear layers 0, 2, 4, 6, 7 with dropout between."""
    sizes = (12, 9, 8, 7, 6, 1)
    chain = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    state = {
        f"layers.{place}.{name}": tensor.detach()
        for place, layer in zip((0, 2, 4, 6, 7), chain, strict=True)
        for name, tensor in layer.named_parameters()
    }
    torch.save(state, tmp_path / "head.pth")
    head = load_aesthetic_head(tmp_path / "head.pth")
    images = normal(5, 12).float()
    expected = torch.nn.Sequential(*chain)(images / images.norm(dim=1, keepdim=True))[:, 0]
    torch.testing.assert_close(head.scores(3 * images), expected.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="reads 12 features"):
        head.scores(normal(2, 13))
    torch.save({"layers.0.weight": torch.ones(2, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no chain of linear layers"):
        load_aesthetic_head(tmp_path / "other.pth")


def test_the_jackknifes_error_is_that_of_a_mean() -> None:
    values = normal(400) + 1
    exact = of_mean(values)
    assert exact.standard_error == pytest.approx(float(values.std()) / 20)
    found = jackknife(lambda chosen: float(values[chosen].mean()), 400, groups=400)
    assert found.value == pytest.approx(exact.value)
    assert found.standard_error == pytest.approx(exact.standard_error)
    with pytest.raises(ValueError, match="at least 2 values, there is 1"):
        jackknife(lambda chosen: float(values[chosen].mean()), 400, groups=1)
    with pytest.raises(ValueError, match="at least 2"):
        of_mean(values[:1])


def test_the_jackknife_of_a_distance_covers_the_spread_over_sets() -> None:
    reference = Moments.of(normal(4000, 4, seed=7) + 0.5)
    drawn = [normal(150, 4, seed=i) for i in range(40)]
    spread = float(np.std([frechet_distance(Moments.of(x), reference) for x in drawn], ddof=1))
    one = drawn[0]
    found = jackknife(lambda chosen: frechet_distance(Moments.of(one[chosen]), reference), 150, groups=50)
    assert found.standard_error == pytest.approx(spread, rel=0.4)


def test_a_distances_error_from_moments_of_groups_is_the_jackknife_done_by_leaving_out() -> None:
    x, y = sets(97, 200, 8)
    reference, groups = Moments.of(y), 5
    found = frechet_estimate(
        [Moments.of(x[i::groups]) for i in range(groups)] + [Moments.empty(8)], reference
    )
    kept = [torch.arange(97) % groups != i for i in range(groups)]
    values = np.array([frechet_distance(Moments.of(x[k]), reference) for k in kept])
    assert found.value == pytest.approx(frechet_distance(Moments.of(x), reference), rel=1e-12)
    assert found.standard_error == pytest.approx(2 * values.std(), rel=1e-9)  # (5 - 1)^1/2 = 2
    with pytest.raises(ValueError, match="at least 2 groups"):
        frechet_estimate([Moments.of(x)], reference)


def test_few_images_are_warned_of_with_the_reason() -> None:
    assert "singular" in (too_few("fd", 500, 2048) or "")
    assert "only at equal N" in (too_few("fd", 5000, 2048) or "")
    assert too_few("fd", 10_000, 2048) is None and too_few("fd", 2000, 64) is None
    assert "no line over 1/N" in (too_few("fid_infinity", 5000, 2048) or "")
    assert too_few("fid_infinity", 50_000, 2048) is None
    assert "nearest" in (too_few("recall", 200, 64) or "") and too_few("kid", 200, 64) is None
    assert "grows with N" in (too_few("inception_score", 1000, 1008) or "")
    with pytest.raises(ValueError, match="no metric"):
        too_few("fdi", 1, 1)


def test_resizes_keep_what_they_must() -> None:
    """A constant stays it, an image of the right size is untouched; bilinear resizes keep a ramp where they should."""
    flat = torch.full((1, 3, 20, 31), 77, dtype=torch.uint8)
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    for mode in RESIZES:
        torch.testing.assert_close(resize(flat, 299, mode), torch.full((1, 3, 299, 299), 77.0))
        assert torch.equal(resize(ramp, 32, mode), ramp)
    # tf1 reads pixel i at i / 2, pytorch at (i + 1/2) / 2 - 1/2; at the border the last pixel repeats.
    assert resize(ramp, 64, "tf1")[0, 0, 0].tolist() == [min(i / 2, 31) for i in range(64)]
    assert resize(ramp, 64, "pytorch")[0, 0, 5].tolist() == [min(max(i / 2 - 0.25, 0), 31) for i in range(64)]


def test_features_are_full_float32_and_the_callers_setting_comes_back() -> None:
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32
    seen = []

    class Net(torch.nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return super().forward(x)

    ModuleFeatures(Net(), name="pixels", dimension=3, size=1).images(
        torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    )
    assert seen == ["ieee"]
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.allow_tf32) == before


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_state(), file)
    return file


def test_inception_has_the_public_files_tensors() -> None:
    """The public file has 566 tensors: 94 convolutions of 6 (with a count of batches, which is not read) and 2."""
    found = shapes()
    assert len(found) == 94 * 5 + 2
    assert found["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert found["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1) and found["fc.weight"] == (
        1008,
        2048,
    )
    # torchvision's network without its second head has 23,834,568 parameters; 8 classes more are 8 x 2,049.
    counted = sum(math.prod(shape) for name, shape in found.items() if "running" not in name)
    assert counted == 23_834_568 + 8 * 2049


def test_incomplete_and_foreign_weights_are_refused_by_name(tmp_path: Path, weights: Path) -> None:
    state = random_state()
    del state["Mixed_5d.branch1x1.conv.weight"]
    with pytest.raises(ValueError, match=r"Mixed_5d.branch1x1.conv.weight has no such tensor"):
        Inception(state)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not readable as weights"):
        load_features(f"inception:{broken}")
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(b"cut")
    with pytest.raises(UserError, match=STATE_SHA256):
        features_sha256(f"inception:{named}")
    assert check_public(named, STATE_SHA256) and not check_public(weights, "0" * 64)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not readable as weights"):
        load_features(f"inception:{tmp_path / 'evil.pth'}")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_one_message_with_name_place_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    try:
        load_features("inception")
    except UserError as error:
        message = str(error)
        assert "pt_inception-2015-12-05-6726825d.pth" in message and STATE_SHA256 in message
        assert str(tmp_path / "torch" / "hub" / "checkpoints") in message and "\n" not in message
    else:
        pytest.skip("this machine has the public weights in its temporary folder")


@pytest.mark.slow
def test_features_of_a_file_name_their_weights_and_give_what_the_metrics_read(weights: Path) -> None:
    network = load_features(f"inception:{weights}", resize="tf1")
    assert network.sha256 == features_sha256(f"inception:{weights}") and "not FID's" in network.fd_name
    assert (network.dimension, network.resize) == (2048, "tf1 (bilinear) to 299")
    pixels = torch.randint(256, (2, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = network.activations(pixels)  # type: ignore[attr-defined]
    assert found.logits.shape == (2, 1008) and found.spatial.shape == (2, 2023)
    torch.testing.assert_close(network.images(pixels), found.features)
    rounded = load_features(f"inception:{weights}", resize="tf1", precision="bf16")
    assert rounded.fd_name == f"{network.fd_name}, bf16"
    apart = rounded.images(pixels) - found.features
    assert rounded.images(pixels).dtype == torch.float32 and 0 < apart.norm() < 0.02 * found.features.norm()
    moments = Moments.of(found.spatial)
    assert sfid(found.spatial, moments) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="sFID compares"):
        sfid(found.features, moments)


class Script(torch.nn.Module):
    """Of the form of ``inception-2015-12-05.pt``: ``layers`` on prepared images, and a resize of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 2048)
        )

    def forward(self, pixels: Tensor, return_features: bool = False) -> Tensor:
        return self.layers(pixels.float()) if return_features else pixels


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_file_gives_features_and_names_what_it_cannot_give(tmp_path: Path) -> None:
    module = Script()
    torch.jit.script(module).save(tmp_path / "script.pt")
    pixels = torch.randint(
        256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    scaled = {"tf1": pixels.float(), "clean": (pixels.float() - 128) / 128, "pytorch": pixels / 127.5 - 1}
    for mode, prepared in scaled.items():
        found = load_features(f"inception:{tmp_path / 'script.pt'}", resize=mode)
        torch.testing.assert_close(found.images(pixels), module.layers(prepared).detach())
    with pytest.raises(UserError, match="are a TorchScript, which is float32: take pt_inception"):
        load_features(f"inception:{tmp_path / 'script.pt'}", precision="bf16")
    with pytest.raises(UserError, match="the TorchScript file does not give"):
        found.activations(pixels)  # type: ignore[attr-defined]
    suite = load_suite("folder").changed(
        {"features": f"inception:{tmp_path / 'script.pt'}", "sfid": True, "inception_score": True}
    )
    extraction = Extraction(suite)
    assert set(extraction.not_computed) == {"sfid", "inception_score"}
    assert STATE_SHA256 in extraction.not_computed["sfid"]
    assert set(extraction(pixels, None)) == {"features"}


OWN = """
import torch
from stepdistill.features.own_module import ModuleFeatures

def mean_colour(mode, device):
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return ModuleFeatures(pool, name="mean colour", dimension=3, size=8, mode=mode, device=device)
"""


def test_a_module_of_ones_own_is_a_feature_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = load_features("module:own_features:mean_colour")
    flat = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 16, 12)
    torch.testing.assert_close(network.images(flat), torch.tensor([[10.0, 20, 30]] * 2))
    assert (network.name, network.resize) == ("module:own_features:mean_colour", "clean to 8")
    assert network.sha256 == features_sha256("module:own_features:mean_colour")
    for wrong in ("module:own_features", "module:own_features:other", "module:no_such:thing"):
        with pytest.raises(UserError, match=r"PACKAGE.MODULE:FUNCTION"):
            load_features(wrong)


def test_dinov2_features_are_the_models_class_token(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    network = load_features(f"dinov2:{tmp_path}")
    pixels = torch.randint(
        256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        scaled = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        expected = model(pixel_values=scaled).last_hidden_state[:, 0]
    torch.testing.assert_close(network.images(pixels), expected, rtol=1e-4, atol=1e-5)
    assert network.dimension == 16 and network.sha256 == features_sha256(f"dinov2:{tmp_path}")
    given = pixels.float().requires_grad_()
    found = network.embed(given)  # type: ignore[attr-defined]
    torch.testing.assert_close(found.detach(), network.images(pixels), rtol=1e-4, atol=1e-5)
    assert float(torch.autograd.grad(found[:, 0].sum(), given)[0].abs().max()) > 0
