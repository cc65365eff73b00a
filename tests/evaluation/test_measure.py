"""Every metric from a suite to a report, with weights that are there and weights that are not, on tiny networks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from stepdistill.data.image_archives import open_images
from stepdistill.errors import UserError
from stepdistill.evaluation.extraction import Extraction
from stepdistill.evaluation.given_images import evaluate_images
from stepdistill.evaluation.measure import BLOCK, in_random_order, measure
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.reference_files import Reference, read_reference
from stepdistill.evaluation.rows import Rows, RowTable
from stepdistill.evaluation.statistics import make_statistics
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import APART as SUITE_APART
from stepdistill.evaluation.suite_identity import suite_sha256, weights_sha256
from stepdistill.features.clip import ClipFeatures
from stepdistill.features.inception import PUBLIC, STATE_SHA256, InceptionFeatures, usual_folders
from stepdistill.features.inception_network import random_state
from stepdistill.features.load import load_features
from stepdistill.features.own_module import ModuleFeatures
from stepdistill.metrics.aesthetic import load_aesthetic_head
from stepdistill.metrics.clip_score import cosines
from stepdistill.metrics.cmmd import cmmd
from stepdistill.metrics.fid_infinity import fid_infinity
from stepdistill.metrics.frechet import Moments, frechet_distance, frechet_distance_of_features
from stepdistill.metrics.inception_score import inception_score
from stepdistill.metrics.kid import kernel_distance
from stepdistill.metrics.prdc import Balls, recall
from stepdistill.metrics.sfid import sfid
from stepdistill.metrics.standard_errors import of_mean
from stepdistill.pictures.given import with_picture
from stepdistill.system.emoji import emoji_captions, emoji_images, features_folder, tokenizer_folder
from stepdistill.system.files import sha256_of

DRAWN, REAL = emoji_images()[:12], emoji_images()[100:109]


class InMemory(RowTable):
    """Rows in parts of ``size``."""

    def __init__(self, rows: Rows, size: int) -> None:
        self._rows, self._size, self.count = rows, size, len(next(iter(rows.values())))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def blocks(self, name: str) -> Iterator[Tensor]:
        return iter(torch.split(self._rows[name], self._size))


def batch(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception of fixed random weights, two CLIP folders, an aesthetic head, and statistics of the real images."""
    from safetensors.torch import load_file

    root = tmp_path_factory.mktemp("weights")
    torch.save(random_state(), root / "inception.pth")
    for name in ("clip", "pick"):
        shutil.copytree(features_folder(), root / name)
        shutil.copytree(tokenizer_folder(), root / name, dirs_exist_ok=True)
    weights = load_file(root / "pick" / "model.safetensors")
    other = {**weights, "logit_scale": torch.tensor(3.0)}
    other["visual_projection.weight"] = weights["visual_projection.weight"].flip(0).contiguous()
    save_file(other, root / "pick" / "model.safetensors", metadata={"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(1, 64, generator=generator), "bias": torch.tensor([5.0])}
    save_file(head, root / "head.safetensors")
    inception = load_features(f"inception:{root / 'inception.pth'}", resize="tf1")
    for name, network in (("real", inception), ("clip_real", load_features(f"clip:{root / 'clip'}"))):
        make_statistics(
            open_images(REAL),
            network,
            root / f"{name}.safetensors",
            resolution=32,
            spatial=name == "real",
            progress=False,
        )
    (root / "prompts.txt").write_text("\n".join(emoji_captions()[: len(DRAWN)]))
    return root


def everything(files: Path, **changes: Any) -> Suite:
    return Suite.model_validate(
        {
            "name": "all",
            "version": 1,
            "n": len(DRAWN),
            "prompts": "prompts.txt",
            "resolution": 32,
            "features": f"inception:{files / 'inception.pth'}",
            "resize": "tf1",
            "reference": "real.safetensors",
            "neighbours": 3,
            "fid_infinity": True,
            "inception_score": True,
            "sfid": True,
            "clip_network": f"clip:{files / 'clip'}",
            "clip_prefix": "A photo depicts ",
            "cmmd": f"clip:{files / 'clip'}",
            "cmmd_reference": "clip_real.safetensors",
            "pick_score": f"clip:{files / 'pick'}",
            "aesthetic": "head.safetensors",
            "aesthetic_network": f"clip:{files / 'clip'}",
            "teacher_steps": 1,
            "folder": files,
            **changes,
        }
    )


@pytest.mark.slow
def test_every_metric_of_one_suite_equals_its_function_by_hand(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = everything(files)
    report = evaluate_images(DRAWN, suite, batch=5, device="cpu", progress=False)
    found = report.scores[0]
    inception = suite.network()
    assert isinstance(inception, InceptionFeatures)
    drawn, reference = inception.activations(batch(DRAWN)), load_reference(suite, inception)
    assert drawn.logits is not None and drawn.spatial is not None and reference.spatial is not None
    assert reference.features is not None
    clip, pick = (load_features(f"clip:{files / name}") for name in ("clip", "pick"))
    assert isinstance(pick, ClipFeatures) and pick.logit_scale == pytest.approx(np.exp(3.0))
    prompts = emoji_captions()[: len(DRAWN)]
    moments = reference.moments
    kid = kernel_distance(drawn.features, reference.features, gamma=inception.kernel_scale)
    balls = Balls.between(reference.features, drawn.features, 3)
    # The statistics file keeps features in half precision.
    distance = cmmd(clip.images(batch(DRAWN)), clip.images(batch(REAL)).half().float())
    score = inception_score(in_random_order(drawn.logits))
    texts = clip.texts([f"A photo depicts {prompt}" for prompt in prompts])
    clip_score = of_mean(cosines(clip.images(batch(DRAWN)), texts))
    picks = of_mean(20.0855369 * cosines(pick.images(batch(DRAWN)), pick.texts(prompts)))
    likes = of_mean(load_aesthetic_head(files / "head.safetensors").scores(clip.images(batch(DRAWN))))
    expected = {
        "fd": frechet_distance_of_features(drawn.features, moments),
        "fid_infinity": fid_infinity(drawn.features, moments).value.value,
        "sfid": sfid(drawn.spatial, reference.spatial),
        "kid": kid.value,
        "kid_se": kid.standard_error,
        "inception_score": score.value,
        "inception_score_deviation": score.deviation,
        "recall": recall(balls),
        "precision_se": of_mean(balls.holding > 0).standard_error,
        "density_se": of_mean(balls.holding / 3).standard_error,
        "cmmd": distance.value,
        "cmmd_se": distance.standard_error,
        "clip_score": clip_score.value,
        "clip_score_se": clip_score.standard_error,
        "pick_score": picks.value,
        "pick_score_se": picks.standard_error,
        "aesthetic": likes.value,
        "aesthetic_se": likes.standard_error,
    }
    seen = report.to_dict()["scores"]["0"]
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, rel=2e-4, abs=1e-9), name
    assert (
        found.recall_se is not None and found.fd_se is None
    )  # 20 more distances of 2,048 features were not asked
    assert report.not_computed == {}
    weights = inception.sha256[:8]
    assert report.metrics == {
        "fd": f"FD-Inception (tf1; weights {weights}, not FID's)",
        "fid_infinity": f"FD-Inception-infinity (tf1; weights {weights}, not FID's)",
        "sfid": f"sFID (tf1; weights {weights}, not FID's)",
        "inception_score": f"Inception score (tf1; weights {weights}, not FID's)",
        "clip_score": "CLIP score (clip)",
        "cmmd": "CMMD (clip)",
        "pick_score": "PickScore (pick)",
        "aesthetic": "aesthetic score (head.safetensors)",
    }
    stated = report.protocol
    assert (
        stated["clip_network_sha256"] == stated["cmmd_sha256"] == clip.sha256 != stated["pick_score_sha256"]
    )
    assert stated["clip_prefix"] == "A photo depicts " and "random groups" in stated["standard_errors"]
    assert len(stated["aesthetic_sha256"]) == len(stated["cmmd_reference_sha256"]) == 64
    header, _, row = report.markdown().splitlines()
    assert "CMMD (clip)" in header and header.count("|") == row.count("|") and "±" in row
    # Too few images, once each, for fd, sfid, fid_infinity, kid, the Inception score, the neighbours and CMMD.
    told = capsys.readouterr().err.splitlines()
    assert len(report.warnings) == 7 and sorted(told) == sorted(report.warnings)
    assert sum("fd of 12 images in 2048 features: their covariance is singular" in line for line in told) == 1


def test_what_can_be_computed_is_when_weights_are_missing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inception is nowhere, nor is PickScore's network: what reads other networks stays, each reason is said once."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    missing = {"features": "inception", "pick_score": f"clip:{tmp_path / 'gone'}", "aesthetic": "gone.pth"}
    suite = everything(files, **missing)
    if any((folder / name).is_file() for folder in usual_folders() for name in PUBLIC):
        pytest.skip("this machine has the public weights in its temporary folder")
    report = evaluate_images(DRAWN, suite, device="cpu", progress=False)
    found, whole = report.scores[0], set(report.not_computed)
    assert whole == set(suite.asked("inception")) - {"clip_score", "cmmd"}
    assert found.fd is None and found.pick_score is None and found.cmmd and found.clip_score
    assert "pt_inception-2015-12-05-6726825d.pth" in report.not_computed["fd"]
    assert STATE_SHA256 in report.not_computed["fd"] and "gone" in report.not_computed["pick_score"]
    assert "gone.pth" in report.not_computed["aesthetic"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not computed: ")]
    assert len(lines) == 3 and lines[0].startswith(
        "not computed: fd, kid, fid_infinity, sfid, inception_score, "
    )
    assert report.protocol["features_sha256"] == report.protocol["pick_score_sha256"] == "missing"
    assert report.metrics["fd"] is None and "| FD |" in report.markdown()
    assert suite_sha256(suite) != suite_sha256(everything(files))
    alone = {"cmmd": None, "cmmd_reference": None, "clip_network": suite.pick_score}
    with pytest.raises(UserError, match="Inception weights are not here"):
        Extraction(suite.changed(alone))
    with pytest.raises(UserError, match="no reference statistics"):
        load_reference(suite.changed({"reference": "nowhere.npz"}), None)


def test_a_network_is_run_once_for_all_its_metrics(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = f"clip:{files / 'clip'}"
    suite = everything(
        files, features=clip, resize="clean", clip_network=None, inception_score=False, sfid=False,
        cmmd_reference=None, reference="clip_real.safetensors", pick_score=clip,
    )  # fmt: skip
    seen: list[int] = []
    images = ClipFeatures.images
    monkeypatch.setattr(ClipFeatures, "images", lambda self, x: seen.append(len(x)) or images(self, x))
    rows = Extraction(suite)(batch(DRAWN), emoji_captions()[: len(DRAWN)])
    named = [with_picture(caption, "a.png") for caption in emoji_captions()[: len(DRAWN)]]
    from_pictures = Extraction(suite)(batch(DRAWN), named)
    for metric in ("clip_score", "pick_score"):  # of the words alone
        assert torch.equal(from_pictures[metric], rows[metric])
    assert seen == [len(DRAWN)] * 2 and set(rows) == {"features", "clip_score", "pick_score", "aesthetic"}
    network = suite.network()
    reference = load_reference(suite, network)
    found = measure(InMemory(rows, 5), suite, network, reference)
    assert reference.features is not None and found.fd_se is not None
    assert found.cmmd == cmmd(rows["features"], reference.features).value


PIXELS = ModuleFeatures(torch.nn.Flatten(), name="pixels", dimension=12, size=2)


def gaussian_suite(**changes: Any) -> Suite:
    quick = load_suite("emoji-quick")
    return quick.changed({"prompts": None, "clip_score": False, "kid": False, "neighbours": 0, **changes})


def table_of(features: Tensor, size: int) -> RowTable:
    return InMemory({"features": features}, size)


def test_standard_errors_are_the_spread_over_disjoint_draws_and_batches_change_nothing() -> None:
    """24 sets of 400 from one law, 12 features: also where recall and coverage depend on all drawn images together."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 12, generator=generator, dtype=torch.float64)
    reference = Reference(Moments.of(real), real, {}, "")
    suite = gaussian_suite(neighbours=5, fid_infinity=True)
    found = []
    for _ in range(24):
        drawn = 0.9 * torch.randn(400, 12, generator=generator, dtype=torch.float64) + 0.3
        found.append(measure(table_of(drawn, 150), suite, PIXELS, reference))
    assert measure(table_of(drawn, 7), suite, PIXELS, reference) == found[-1]  # to the last bit
    for name in ("fd", "fid_infinity", "precision", "recall", "density", "coverage"):
        spread = float(np.std([getattr(scores, name) for scores in found], ddof=1))
        error = float(np.mean([getattr(scores, f"{name}_se") for scores in found]))
        assert 0.65 < error / spread < 1.7, name
    assert found[0].fd == pytest.approx(found[1].fd, abs=6 * (found[0].fd_se or 0))


@pytest.mark.parametrize(("count", "dimension"), [(400, 4), (100, 120)])
def test_the_order_of_the_images_moves_no_standard_error(count: int, dimension: int) -> None:
    """Five classes that take turns: every 20th image is of one class, and a group of those no random one. With more
    images than features, and with fewer."""
    generator = torch.Generator().manual_seed(2)
    real = 4 * torch.randn(5, dimension, generator=generator).repeat(80, 1)
    real += torch.randn(400, dimension, generator=generator)
    network = ModuleFeatures(torch.nn.Flatten(), name="pixels", dimension=dimension, size=2)
    reference = Reference(Moments.of(real), real, {}, "")
    turns = 4 * torch.randn(5, dimension, generator=generator).repeat(count // 5, 1)
    turns += torch.randn(count, dimension, generator=generator)
    lots = [turns[torch.randperm(count, generator=generator)] for _ in range(6)]
    suite = gaussian_suite(neighbours=3)
    of_turns, *of_lots = (measure(table_of(x, 100), suite, network, reference) for x in (turns, *lots))
    for name in ("fd", "recall", "coverage"):
        usual = float(np.mean([getattr(scores, f"{name}_se") for scores in of_lots]))
        assert getattr(of_turns, name) == pytest.approx(getattr(of_lots[0], name), rel=1e-9), name
        assert getattr(of_turns, f"{name}_se") == pytest.approx(usual, rel=0.6), name


def test_the_inception_score_does_not_depend_on_folders_of_one_class_each() -> None:
    logits = 20 * torch.eye(1008)[torch.arange(1000) // 100]  # ten classes, one after the other
    table = InMemory({"logits": logits}, 300)
    suite = gaussian_suite(features="inception", inception_score=True)
    found = measure(table, suite, None, Reference(Moments.empty(1), None, {}, ""))
    assert inception_score(logits).value == pytest.approx(1, abs=1e-4)
    assert found.inception_score == pytest.approx(10, rel=0.1)


def test_every_number_is_computed_where_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of torch's fake tensors, which know shapes and devices and no numbers: no operation is between two
    devices, and what is read comes from there, but for lines and spreads of numbers that were read before."""
    seen: list[str] = []

    def read(self: Tensor, value: Any) -> Any:
        seen.append(self.device.type)
        return value

    monkeypatch.setattr(FakeTensor, "__float__", lambda self: read(self, 1.0))
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: read(self, True))
    monkeypatch.setattr("stepdistill.evaluation.measure.GROUPS", 2)  # operations on fake tensors are slow
    monkeypatch.setattr("stepdistill.evaluation.measure.INFINITY_GROUPS", 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(64, 12)
        reference = Reference(Moments.of(x), x, {}, "", Moments.of(x), embeddings=x)
        table = InMemory({"features": x, "spatial": x, "logits": x, "clip_embedding": x}, 32)
        suite = gaussian_suite(neighbours=3, kid=True, fid_infinity=True).model_copy(update={"cmmd": "emoji"})
        measure(table, suite, PIXELS, reference, "cuda")
    assert (seen.count("cuda"), seen.count("cpu")) == (148, 14)


def test_many_rows_are_read_in_blocks_with_the_moments_of_all() -> None:
    """More rows than a block holds, in batches that fit into none; and with no more rows than features."""
    generator = torch.Generator().manual_seed(1)
    reference = Reference(Moments.of(torch.randn(50, 12, generator=generator)), None, {}, "")
    many = torch.randn(17_003, 12, generator=generator)
    found = measure(table_of(many, 999), gaussian_suite(), PIXELS, reference)
    assert found.fd == pytest.approx(frechet_distance(Moments.of(many), reference.moments), rel=1e-10)
    mixed = torch.cat([in_random_order(block) for block in many.split(BLOCK)])
    groups = [Moments.of(mixed[torch.arange(17_003) % 20 != i]) for i in range(20)]
    values = np.array([frechet_distance(kept, reference.moments) for kept in groups])
    assert found.fd_se == pytest.approx(19**0.5 * values.std(), rel=1e-7)
    few = measure(table_of(many[:9], 2), gaussian_suite(), PIXELS, reference)
    values = np.array(
        [frechet_distance_of_features(many[:9][torch.arange(9) != i], reference.moments) for i in range(9)]
    )
    assert few.fd_se == pytest.approx(8**0.5 * values.std(), rel=1e-7) and few.recall is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sfid": True}, "sfid reads layers of Inception"),
        ({"inception_score": True}, "set features to inception, or inception_score to false"),
        ({"clip_prefix": "a "}, "clip_network and clip_prefix are of the CLIP score"),
        (
            {"features": "inception", "clip_score": True, "prompts": "emoji"},
            "features inception have no texts",
        ),
        ({"cmmd": "dinov2:x", "cmmd_reference": "x"}, "cmmd is dinov2:x: it must be a CLIP network"),
        ({"cmmd": "clip:x"}, "cmmd needs cmmd_reference, made by stepdistill stats --features clip:x"),
        ({"cmmd_reference": "x"}, "cmmd_reference is of CMMD"),
        ({"pick_score": "clip:x"}, "pick_score needs prompts"),
        ({"aesthetic_network": "clip:x"}, "give aesthetic, its head file"),
    ],
)
def test_metrics_that_make_no_sense_together_are_refused_in_one_line(
    changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        gaussian_suite(**changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_adds_an_error_does_not_move_the_suites_hash_and_a_metric_does(files: Path) -> None:
    emoji = load_suite("emoji")
    assert suite_sha256(emoji) == EMOJI == suite_sha256(emoji.changed({"intervals": True}))
    assert suite_sha256(emoji.changed({"fid_infinity": True})) != EMOJI
    suite = everything(files)
    # The rule by which a score is computed counts: the Inception score's logits once had a bias.
    plain = gaussian_suite(features=suite.features, resize="tf1", inception_score=True)
    content = {
        "suite": {**plain.model_dump(mode="json", exclude_defaults=True, exclude=SUITE_APART)},
        "prompts": None,
        "features": weights_sha256(plain.features),
        "reference": sha256_of(plain.reference_file()),
        "inception_score": "logits without bias",
    }
    content["suite"] |= {"version": plain.adds_to, "features": "inception"}
    assert suite_sha256(plain) == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    for key in ("clip_prefix", "cmmd", "pick_score", "aesthetic", "clip_network"):
        other = {"clip_prefix": "", "aesthetic": "gone"}.get(key, "emoji")
        assert suite_sha256(suite.changed({key: other})) != suite_sha256(suite), key


EMOJI = "3e014ea916fb16aacde84aad3e3496329f97cce276a03807227204a2179c4716"


def test_a_reference_without_what_a_metric_needs_is_refused(files: Path) -> None:
    network = load_features(f"inception:{files / 'inception.pth'}", resize="tf1")
    bare = files / "bare.safetensors"
    make_statistics(open_images(REAL[:3]), network, bare, resolution=32, keep_features=False, progress=False)
    whole = files / "whole.safetensors"
    make_statistics(open_images(REAL[:3]), network, whole, resolution=32, spatial=True, progress=False)
    spatial = network.activations(batch(REAL[:3])).spatial  # type: ignore[attr-defined]
    kept = read_reference(whole).spatial
    assert kept is not None and kept.count == 3
    torch.testing.assert_close(kept.covariance, torch.cov(spatial.double().T), rtol=1e-4, atol=1e-6)
    suite = everything(files, kid=False, reference="bare.safetensors")
    with pytest.raises(UserError, match="no spatial moments, which sfid needs"):
        load_reference(suite, network)
    with pytest.raises(UserError, match="was made with features_sha256"):
        load_reference(everything(files, cmmd_reference="real.safetensors"), network)
    with pytest.raises(UserError, match="holds no features, which cmmd needs"):
        clip = load_features(f"clip:{files / 'clip'}")
        make_statistics(open_images(REAL), clip, bare, resolution=32, keep_features=False, progress=False)
        load_reference(everything(files, cmmd_reference="bare.safetensors"), network)
    with pytest.raises(UserError, match="have no spatial features"):
        make_statistics(open_images(REAL), clip, bare, resolution=32, spatial=True, progress=False)
