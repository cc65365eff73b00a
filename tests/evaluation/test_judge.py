"""The judge: its file, its features, how pictures fit captions, and the second features of a suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.given_images import evaluate_images
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import protocol_of, suite_sha256
from stepdistill.features.judge import Judge, load_judge
from stepdistill.features.judge_network import words_of
from stepdistill.features.load import features_sha256, load_features
from stepdistill.metrics.frechet import Moments, frechet_distance
from stepdistill.system.emoji import emoji_captions, emoji_groups, emoji_images

SHA256 = "0cb108dd37ac5012d10d904c44a4df90d22ec294d64ff2d0cb34a29ef7ef30ba"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    """Numbers of the images that the judge has not learnt from."""
    return torch.arange(19, len(emoji_captions()), 20)


def pictures(numbers: Tensor) -> Tensor:
    return torch.from_numpy(emoji_images()[numbers.numpy()]).permute(0, 3, 1, 2) / 255  # [B, 3, 32, 32]


def test_the_file_is_the_one_that_the_reference_was_made_with(judge: Judge) -> None:
    assert judge.sha256 == features_sha256("judge") == SHA256
    assert isinstance(load_features("judge"), Judge)


def test_features_are_unit_vectors_of_one_image_whatever_its_neighbours_and_size(judge: Judge) -> None:
    x = pictures(torch.tensor([3, 700, 2000]))
    features = judge.features(x)
    assert features.shape == (3, 64) and torch.allclose(features.norm(dim=1), torch.ones(3))
    assert torch.allclose(judge.features(x[1:2]), features[1:2], atol=1e-6)
    assert torch.equal(judge.images((255 * x).round().byte()), features)
    large = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (judge.features(large) * features).sum(1).min() > 0.95


def test_gradients_in_the_images_are_those_of_finite_differences(judge: Judge) -> None:
    x, captions = pictures(torch.tensor([5, 1700])), ["keycap 3", "a woman"]
    x = (0.9 * x + 0.05).requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(judge.fit(x, captions).sum(), x)
    with torch.no_grad():
        ends = [judge.fit(x + step * direction, captions).double().sum() for step in (1e-3, -1e-3)]
    assert float((slope * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=0.02)


def test_a_picture_fits_its_own_caption_better_than_another_and_its_group(
    judge: Judge, held_out: Tensor
) -> None:
    captions = [emoji_captions()[i] for i in held_out.tolist()]
    features = judge.features(pictures(held_out))
    every = judge.fits(features, captions)  # [H, H]
    own = every.diagonal()
    assert torch.allclose(own, judge.fit(pictures(held_out), captions), atol=1e-5)
    others = (every.sum(1) - own) / (len(captions) - 1)
    assert (own > others).float().mean() > 0.9 and own.mean() > 1 and others.mean() < 0
    right = [judge.groups[i] for i in judge.groups_of(features).argmax(1).tolist()]
    assert sum(a == emoji_groups()[i] for a, i in zip(right, held_out.tolist(), strict=True)) > 0.8 * len(
        right
    )


def test_fit_is_the_mean_of_the_words_it_knows_and_0_where_it_knows_none(judge: Judge) -> None:
    x = pictures(torch.tensor([1700]))
    one, other, both, none = (
        judge.fit(x, [text]) for text in ("woman", "wheelchair", "A woman, wheelchair", "qq")
    )
    assert "a" in judge.words  # of "a button (blood type)"
    with_a = torch.stack([one, other, judge.fit(x, ["a"])]).mean(0)
    assert torch.allclose(both, with_a, atol=1e-5) and none.tolist() == [0]
    assert words_of("Man: medium-light skin tone, red hair man") == [
        "man", "medium-light", "skin", "tone", "red", "hair",
    ]  # fmt: skip


def test_the_judge_says_something_else_than_clip(judge: Judge, held_out: Tensor) -> None:
    """Similarities of pairs of pictures that neither has seen: their ranks have little in common."""
    pixels = (255 * pictures(held_out)).round().byte()
    apart = ~torch.eye(len(pixels), dtype=torch.bool)
    ranks = []
    for features in (judge.images(pixels), load_features("emoji").images(pixels)):
        ranks.append((features @ features.T)[apart].argsort().argsort().double())
    assert 0 < torch.corrcoef(torch.stack(ranks))[0, 1] < 0.5


def test_version_2_has_the_identity_of_version_1_and_the_judges_beside_it() -> None:
    hashes = {
        "emoji": "3e014ea916fb16aacde84aad3e3496329f97cce276a03807227204a2179c4716",
        "emoji-quick": "5b0abe42ddcf0f30ad4aa6396c813136f93424ea12388ea83398d3d382aaf492",
    }  # of version 1
    for name, sha256 in hashes.items():
        suite = load_suite(name)
        assert suite.label == f"{name}@2" and suite_sha256(suite) == sha256
        without = suite.changed({"second_features": None, "second_reference": None})
        assert suite_sha256(without) == sha256
        before = suite.before()
        assert before is not None and before.label == f"{name}@1" and suite_sha256(before) == sha256
        assert before.before() is None
        assert protocol_of(suite, None)["second_features_sha256"] == SHA256
        assert suite_sha256(suite.changed({"adds_to": None})) != sha256
        assert set(suite.asked("emoji")) - set(without.asked("emoji")) == {"second_fd", "second_fit"}


def quick(**changes: object) -> Suite:
    return load_suite("emoji-quick").changed({"n": 150, **changes})


@pytest.mark.slow
def test_the_second_features_move_no_other_score_and_are_the_judges_own(judge: Judge) -> None:
    images, suite = emoji_images()[:150], quick()
    plain = evaluate_images(
        images, quick(second_features=None, second_reference=None), device="cpu", progress=False
    )
    report = evaluate_images(images, suite, device="cpu", progress=False)
    found, before = report.scores[0].values(), plain.scores[0].values()
    new = {"second_fd", "second_fd_se", "second_fit", "second_fit_se"}
    assert {k: v for k, v in found.items() if k not in new and k != "peak_memory_bytes"} == {
        k: v for k, v in before.items() if k not in new and k != "peak_memory_bytes"
    }
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    features, every = judge.images(pixels), judge.images(torch.from_numpy(emoji_images()).permute(0, 3, 1, 2))
    moments = [Moments.of(x) for x in (features, every)]
    assert found["second_fd"] == pytest.approx(100 * frechet_distance(*moments), rel=1e-4)
    fit = judge.fit_of(features, suite.prompt_list() or [])
    assert found["second_fit"] == pytest.approx(float(fit.mean()), abs=1e-5)
    assert found["second_fit_se"] == pytest.approx(float(fit.std() / 150**0.5), rel=1e-3)
    assert report.metrics["second_fd"] == "FD-judge" and report.metrics["second_fit"] == "judge fit"
    assert "second_fd" not in plain.metrics
    header = report.markdown().splitlines()[0]
    assert "FD-judge" in header and "judge fit" in header and "FD-judge" not in plain.markdown()


@pytest.mark.slow
def test_fd_judge_of_the_real_images_is_0_and_of_some_of_them_the_bias_of_their_number(judge: Judge) -> None:
    suite = load_suite("emoji")
    reference = load_reference(suite, suite.network()).second
    assert reference is not None
    features = judge.images(torch.from_numpy(emoji_images()).permute(0, 3, 1, 2))
    assert frechet_distance(Moments.of(features), reference) == pytest.approx(0, abs=1e-6)
    mixed = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]
    few, many = (frechet_distance(Moments.of(mixed[:n]), reference) for n in (500, 2000))
    assert 0 < many < few < 0.02


def test_second_features_are_checked_with_the_suite(tmp_path: Path) -> None:
    for changes, says in (
        ({"second_features": None}, "second_reference is of second_features"),
        ({"second_features": "emoji"}, "second_features is emoji, as features is"),
        ({"second_reference": None}, "second_features needs second_reference"),
        ({"adds_to": 2}, "adds_to is 2: it is a version before 2"),
    ):
        with pytest.raises(UserError, match=says):
            quick(**changes)
    with pytest.raises(UserError, match=r"no statistics nowhere\.safetensors"):
        evaluate_images(emoji_images()[:150], quick(second_reference="nowhere.safetensors"), progress=False)
    with pytest.raises(UserError, match="was made with features_sha256"):
        evaluate_images(emoji_images()[:150], quick(second_reference="emoji.safetensors"), progress=False)
