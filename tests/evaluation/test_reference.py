"""Reference statistics: every format gives the moments that were put in, what does not fit is an error and not a
number, and no pickle runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from stepdistill.cli import main
from stepdistill.data.image_archives import open_images
from stepdistill.errors import UserError
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.given_images import evaluate_images, score_images
from stepdistill.evaluation.pickled_statistics import read_pickled_statistics
from stepdistill.evaluation.reference import for_reference, load_reference
from stepdistill.evaluation.reference_files import read_reference
from stepdistill.evaluation.statistics import make_statistics
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import suite_sha256
from stepdistill.features.load import network_of
from stepdistill.features.network import FeatureNetwork, Precision
from stepdistill.system.emoji import emoji_images

RANDOM = np.random.default_rng(0)
MEAN = RANDOM.normal(size=6)
ROOT = RANDOM.normal(size=(6, 6))
COVARIANCE = ROOT @ ROOT.T


class Means:
    """Features of fixed random weights: six mixtures of the channels' means and deviations."""

    name = "means"
    sha256 = "0" * 64
    dimension = 6
    resize = "clean (none)"
    fd_name = "FD-means"
    fd_scale = 1.0
    clip_name = None
    kernel_scale = 1.0
    device = torch.device("cpu")
    precision: Precision = "float32"

    def images(self, pixels: Tensor) -> Tensor:
        flat = pixels.float().flatten(2) / 255
        weights = torch.from_numpy(ROOT).float()
        return torch.cat([flat.mean(2), flat.std(2)], 1) @ weights

    def texts(self, prompts: Sequence[str]) -> Tensor:
        raise NotImplementedError


NETWORK: FeatureNetwork = Means()


def suite_of(reference: Path, **changes: Any) -> Suite:
    values = {"name": "mine", "version": 1, "n": 0, "resolution": 8, "features": "means", "teacher_steps": 1}
    values |= {"kid": False, "clip_score": False, "neighbours": 0, "reference": str(reference)}
    return Suite.model_validate(values | changes)


STATED = {"features": "means", "resize": "clean", "resolution": 8}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_format_gives_the_moments_that_were_put_in(tmp_path: Path, protocol: int) -> None:
    statistics = {"mu": MEAN, "sigma": COVARIANCE}
    np.savez(tmp_path / "edm.npz", **statistics)
    np.savez(
        tmp_path / "adm.npz",
        **statistics,
        mu_s=MEAN + 1,
        sigma_s=COVARIANCE,
        arr_0=np.zeros((3, 8, 8, 3), "u1"),
    )
    edm2 = {
        "fid": statistics,
        "fd_dinov2": {"mu": MEAN + 2, "sigma": np.asfortranarray(COVARIANCE.astype(">f8"))},
        "num_images": np.int64(50),
    }
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(edm2, protocol=protocol))
    for name, network, shift in (
        ("edm.npz", "inception", 0),
        ("adm.npz", "inception", 0),
        ("edm2.pkl", "inception", 0),
        ("edm2.pkl", "dinov2", 2),
    ):
        found = read_reference(tmp_path / name, network)
        np.testing.assert_allclose(found.moments.mean, MEAN + shift, rtol=1e-12)
        np.testing.assert_allclose(found.moments.covariance, COVARIANCE, rtol=1e-7, atol=1e-9)
        assert found.protocol == {} and found.has_images == (name == "adm.npz")
        assert (found.spatial is None) == (name != "adm.npz")
    spatial = read_reference(tmp_path / "adm.npz").spatial
    assert spatial is not None
    np.testing.assert_allclose(spatial.mean, MEAN + 1, rtol=1e-12)
    assert read_reference(tmp_path / "edm2.pkl").moments.count == 50
    with pytest.raises(UserError, match="holds fd_dinov2, fid, num_images; statistics of clip are clip"):
        read_reference(tmp_path / "edm2.pkl", "clip")


class Bomb:
    """A pickle that makes a folder when it is loaded the usual way."""

    def __init__(self, place: Path, call: Any = os.mkdir) -> None:
        self._place, self._call = place, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, (str(self._place),)


def test_a_pickle_that_tries_to_run_code_is_refused_and_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes run when pickle loads them; our reader names the call and nothing has happened."""
    place = tmp_path / "it_ran"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_of_a_pickle.py").write_text("name = dict\n")
    command = f"__import__('os').mkdir({str(place)!r})"
    bombs = {
        "mkdir.pkl": pickle.dumps({"mu": Bomb(place)}),
        "key.pkl": pickle.dumps({Bomb(place): 1}, protocol=2),
        "eval.pkl": f"cbuiltins\neval\n(V{command}\ntR.".encode(),
        "inst.pkl": f"(V{command}\nibuiltins\nexec\n.".encode(),
        "module.pkl": b"cmodule_of_a_pickle\nname\n.",
        "attribute.pkl": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dtype\x93.",
    }
    for name, data in bombs.items():
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"is refused .*nothing of it was run") as caught:
            read_reference(file)
        assert not place.exists() and "\n" not in str(caught.value)
    pickle.loads(bombs["mkdir.pkl"])
    assert place.is_dir()  # the test's own proof that the pickle would have run
    assert "module_of_a_pickle" not in sys.modules  # a foreign name is not even imported
    assert pickle.loads(bombs["module.pkl"]) is dict and "module_of_a_pickle" in sys.modules


def test_a_damaged_or_strange_pickle_is_one_line(tmp_path: Path) -> None:
    whole = pickle.dumps({"mu": MEAN, "sigma": COVARIANCE})
    cases = {
        "cut": whole[:-40],
        "text": b"hello",
        "objects": pickle.dumps({"mu": np.array([{}], dtype=object), "sigma": COVARIANCE}),
        "list": pickle.dumps([1, 2]),
        "bare": pickle.dumps({"mu": MEAN}),
        "class": b"cnumpy\nndarray\n.",
    }
    for name, data in cases.items():
        file = tmp_path / f"{name}.pkl"
        file.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_reference(file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(pickle.dumps({"n": [1, 2.5, None, True, "x"], "mu": np.float32(3)}))
    assert read_pickled_statistics(file) == {"n": [1, 2.5, None, True, "x"], "mu": 3.0}


def test_damaged_statistics_are_one_line(tmp_path: Path) -> None:
    good = {"mu": MEAN, "sigma": COVARIANCE}
    bad_mean = MEAN.copy()
    bad_mean[2] = np.nan
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "nan": ({**good, "mu": bad_mean}, "has NaN or Inf"),
        "shape": ({**good, "sigma": COVARIANCE[:5]}, "must be"),
        "skew": ({**good, "sigma": np.triu(COVARIANCE)}, "not symmetric"),
        "indefinite": (
            {**good, "sigma": COVARIANCE - COVARIANCE.max() * np.eye(6)},
            "not positive semidefinite",
        ),
        "complex": ({**good, "sigma": COVARIANCE + 1e-3j * np.abs(COVARIANCE).max()}, "is complex"),
        "bare": ({"mu": MEAN}, "holds mu; reference statistics are mu and sigma"),
        "images": ({"arr_0": MEAN}, "make statistics of its images with stepdistill stats"),
        "objects": ({**good, "mu": np.array([{}], dtype=object)}, "not an npz of numbers"),
        "text": ({**good, "mu": np.array(["a"] * 6)}, "not arrays of numbers"),
    }
    for name, (content, says) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(UserError, match=says):
            read_reference(tmp_path / f"{name}.npz")
    whole = (tmp_path / "nan.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:300])
    (tmp_path / "cut.safetensors").write_bytes(whole[:300])
    for name in ("cut.npz", "cut.safetensors"):
        with pytest.raises(UserError) as caught:
            read_reference(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_what_rounding_does_to_a_singular_covariance_is_read(tmp_path: Path) -> None:
    """float16 puts eigenvalues of 0 some 1e-5 of the largest below 0; a matrix square root leaves imaginary parts."""
    flat = ROOT[:, :3] @ ROOT[:, :3].T
    top = np.linalg.eigvalsh(flat)[-1]
    for name, sigma in (("half", flat.astype(np.float16)), ("root", flat + 1e-9j * top)):
        np.savez(tmp_path / f"{name}.npz", mu=MEAN, sigma=sigma)
        found = read_reference(tmp_path / f"{name}.npz").moments.covariance
        np.testing.assert_allclose(found, flat, rtol=0, atol=1e-3 * top)
    np.savez(tmp_path / "sunk.npz", mu=MEAN, sigma=flat - 5e-4 * top * np.eye(6))
    read_reference(tmp_path / "sunk.npz")
    np.savez(tmp_path / "sunk.npz", mu=MEAN, sigma=flat - 2e-3 * top * np.eye(6))
    with pytest.raises(UserError, match="not positive semidefinite"):
        read_reference(tmp_path / "sunk.npz")


def test_a_file_without_protocol_must_be_stated_and_a_mismatch_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "edm.npz"
    np.savez(file, mu=MEAN, sigma=COVARIANCE)
    assert load_reference(suite_of(file, reference_protocol=STATED), NETWORK).moments.count > 1
    for key in STATED:
        told = {other: value for other, value in STATED.items() if other != key}
        for stated in (told, None) if key == "features" else (told,):
            with pytest.raises(
                UserError, match=rf"does not say its {key}: state reference_protocol\.{key} in"
            ):
                load_reference(suite_of(file, reference_protocol=stated), NETWORK)
    for key, value in {
        "features": "x",
        "resize": "tf1",
        "resolution": 32,
        "features_sha256": "1" * 64,
    }.items():
        with pytest.raises(UserError, match=f"was made with {key} {value}, the suite has"):
            load_reference(suite_of(file, reference_protocol={**STATED, key: value}), NETWORK)
    with pytest.raises(UserError, match="holds no features, which kid needs"):
        load_reference(suite_of(file, reference_protocol=STATED, kid=True), NETWORK)
    np.savez(file, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match="has 5 features, means has 6: another network made it"):
        load_reference(suite_of(file, reference_protocol=STATED), NETWORK)
    with pytest.raises(ValueError, match="Extra inputs"):
        suite_of(file, reference_protocol={"feature": "x"})


def test_statistics_hold_their_protocol_and_another_protocol_is_refused(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    file = tmp_path / "a.safetensors"
    source = open_images(tmp_path / "a.npz", resolution=8)
    made = make_statistics(source, NETWORK, file, resolution=8, batch=7, progress=False)
    assert made["n"] == 40 and made["pixels_sha256"] == source.pixels_sha256() and made["skipped"] == 0
    with safe_open(file, "pt") as content:
        assert json.loads(content.metadata()["protocol"]) == made
    reference = load_reference(suite_of(file, kid=True), NETWORK)
    features = NETWORK.images(torch.from_numpy(pixels).permute(0, 3, 1, 2)).double().numpy()
    np.testing.assert_allclose(reference.moments.mean, features.mean(0), rtol=1e-10)
    np.testing.assert_allclose(reference.moments.covariance, np.cov(features.T), atol=1e-10)
    assert reference.features is not None and reference.features.shape == (40, 6)
    # Other batches and another container give the same statistics.
    other = tmp_path / "b.safetensors"
    make_statistics(
        open_images(pixels), NETWORK, other, resolution=8, keep_features=False, batch=40, progress=False
    )
    again = read_reference(other)
    assert again.features is None and again.protocol["pixels_sha256"] == made["pixels_sha256"]
    np.testing.assert_allclose(again.moments.covariance, reference.moments.covariance, rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="was made with resolution 8, the suite has 16"):
        load_reference(suite_of(file, resolution=16), NETWORK)
    changed: Any = Means()
    changed.resize = "tf1 (none)"
    with pytest.raises(UserError, match=r"was made with resize clean \(none\), the suite has tf1 \(none\)"):
        load_reference(suite_of(file), changed)
    changed = Means()
    changed.sha256 = "1" * 64
    with pytest.raises(UserError, match="was made with features_sha256 0000"):
        load_reference(suite_of(file), changed)
    changed = Means()
    changed.precision = "bf16"
    make_statistics(open_images(pixels), changed, other, resolution=8, progress=False)
    with pytest.raises(UserError, match="was made with precision bf16, the suite has float32"):
        load_reference(suite_of(other), NETWORK)
    assert load_reference(suite_of(other, precision="bf16"), changed).protocol["precision"] == "bf16"
    load_reference(suite_of(file, precision="bf16"), changed)  # one of float32 serves it as well
    with pytest.raises(UserError, match="at least 2 images, there are 1"):
        make_statistics(open_images(pixels[:1]), NETWORK, other, resolution=8, progress=False)
    changed.images = lambda batch: torch.full((len(batch), 6), float("nan"))
    with pytest.raises(UserError, match="means gives NaN or Inf"):
        make_statistics(open_images(pixels), changed, other, resolution=8, progress=False)


def test_the_images_of_an_adm_file_give_the_features_that_kid_needs(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", mu=MEAN, sigma=COVARIANCE, arr_0=pixels)
    found = load_reference(suite_of(tmp_path / "adm.npz", reference_protocol=STATED, kid=True), NETWORK)
    assert found.features is not None
    torch.testing.assert_close(found.features, NETWORK.images(torch.from_numpy(pixels).permute(0, 3, 1, 2)))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stepdistill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_from_two_folders_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`stats` and `eval` on the user's own images; the number is that of score_images on the same pixels."""
    monkeypatch.chdir(tmp_path)
    pixels = emoji_images()
    for name, first in (("real", 0), ("drawn", 100)):
        Path(name).mkdir()
        for i in range(first, first + 70):
            Image.fromarray(pixels[i]).save(f"{name}/{i}.png")
    Path("drawn/broken.png").write_text("x")
    assert run(monkeypatch, *"stats real --resolution 32 --output real.safetensors".split()) == 0
    assert (
        run(monkeypatch, *"eval drawn --suite folder --reference real.safetensors --output r.json".split())
        == 0
    )
    told = capsys.readouterr()
    assert "broken.png: cannot be read" in told.err and "| drawn | folder@1 |" in told.out
    report = json.loads(Path("r.json").read_text())
    assert report["n"] == report["images"]["used"] == 70 and report["metrics"]["fd"] == "FD-emoji"
    assert [skipped["name"] for skipped in report["images"]["skipped"]] == ["broken.png"]
    suite = for_reference(load_suite("folder"), Path("real.safetensors"))
    assert (suite.resolution, suite.features, suite.resize, suite.kid) == (32, "emoji", "clean", True)
    named = suite.changed({"reference": "edm.npz", "reference_protocol": {"resolution": 32}, "n": 70})
    Path("edm.npz").write_bytes(b"")  # what a suite states of its own file says nothing of another one
    assert for_reference(named, Path("edm.npz")).reference_protocol == named.reference_protocol
    assert for_reference(named, Path("real.safetensors")).reference_protocol is None
    assert run(monkeypatch, *"eval real --suite folder --reference real.safetensors --n 70".split()) == 0
    assert (
        "| real | folder@1+n=70 |" in capsys.readouterr().out
    )  # the suite leaves n open, not what n is given
    batch = torch.from_numpy(pixels[100:170]).permute(0, 3, 1, 2)
    direct = score_images(torch.split(batch, 23), None, suite)
    assert report["scores"]["0"]["fd"] == pytest.approx(direct.fd, rel=1e-5)
    assert report["scores"]["0"]["kid"] == pytest.approx(direct.kid, rel=1e-4)

    bad = {
        "eval drawn --suite emoji-quick": "drawn holds 71 images, suite emoji-quick@2 asks 200",
        "eval drawn --suite folder": "has no reference: give --reference",
        "eval drawn --suite folder --steps 4": "--steps, --guidance, --trailing and --diversity are of pipelines",
        "eval drawn --suite folder --reference gone.npz": "no reference statistics gone.npz",
        "eval empty --suite folder": "empty is neither a pipeline (it has no model_index.json) nor a run",
        "eval one --suite folder --reference real.safetensors": "at least 3 images, there are 1",
        "eval drawn --suite folder --reference few.safetensors": "is of 4 images, the suite's metrics need 6",
        "eval drawn --suite emoji --n 2": "a distance needs at least 3 images",
        "eval drawn --suite folder --reference edm.npz": "edm.npz does not say what made it",
        "eval emoji --suite folder --reference real.safetensors": "leaves n or resolution open",
        "stats real --output real.npz": "let the name end in .safetensors",
        "stats real --resize tf1 --output x.safetensors": "features emoji have no resize 'tf1'",
        "stats one --output x.safetensors": "statistics need at least 2 images, there are 1",
        "eval drawn --suite another.yaml": "another.npz has 2048 features, emoji has 64: another network made it",
        "eval nan.npz --suite folder --reference real.safetensors": "arr_0 is float32 [3, 8, 8, 3]",
        "eval cut.npz --suite folder --reference real.safetensors": "cut.npz is damaged, cut off",
        "eval drawn --suite folder --reference cut.npz": "cut.npz is damaged, cut off or not an npz of numbers",
        "eval drawn --suite folder --reference bomb.pkl": "nothing of it was run",
        "eval odd --suite folder --reference real.safetensors": "at least 3 images, there are 1",
        "eval emoji --suite labels.yaml": "draws from prompts, suite labels@1 has none",
    }
    np.savez("nan.npz", arr_0=np.full((3, 8, 8, 3), np.nan, np.float32))
    np.savez("whole.npz", arr_0=pixels[:5])
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:900])
    Path("bomb.pkl").write_bytes(pickle.dumps({"mu": Bomb(tmp_path / "it_ran")}))
    Path("odd").mkdir()
    rgb = Image.fromarray(pixels[0])
    rgb.convert("CMYK").save("odd/cmyk.tif")
    rgb.save("odd/animated.gif", save_all=True, append_images=[Image.fromarray(pixels[1])])
    Image.fromarray(pixels[0, :, :, 0].astype(np.uint16) * 257).save("odd/deep.png")
    np.savez("another.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    labels = "version: 1\nresolution: 32\nclip_score: false\nkid: false\nteacher_steps: 1\n"
    stated = "reference_protocol: {features: emoji, resize: clean, resolution: 32}\n"
    Path("labels.yaml").write_text(f"{labels}n: 70\nname: labels\nreference: real.safetensors\n")
    Path("another.yaml").write_text(f"{labels}n: 0\nname: another\nreference: another.npz\n{stated}")
    Path("empty").mkdir()
    Path("one").mkdir()
    Image.fromarray(pixels[0]).save("one/a.png")
    np.savez("edm.npz", mu=np.zeros(64), sigma=np.eye(64))
    few = open_images(pixels[:4])
    make_statistics(few, suite.network(), Path("few.safetensors"), resolution=32, progress=False)
    for command, says in bad.items():
        assert run(monkeypatch, *command.split()) == 2
        told = capsys.readouterr().err
        last = told.splitlines()[-1]
        assert last.startswith("stepdistill: ") and says in last
        if command.startswith("eval odd"):
            for name, reason in {"animated.gif": "animated", "deep.png": "not 8-bit"}.items():
                assert f"  {name}: {reason}" in told
            assert "odd: 1 images: CMYK to RGB" in told
    assert not Path("x.safetensors").exists() and not Path("it_ran").exists()


def test_another_reference_is_another_suite_and_the_same_in_another_place_is_not(tmp_path: Path) -> None:
    suite, pixels = load_suite("emoji"), emoji_images()[:40]
    other, renamed, moved = (tmp_path / name for name in ("other/emoji.safetensors", "b.safetensors", "c"))
    for folder in (other.parent, moved):
        folder.mkdir()
    network = suite.network()
    make_statistics(open_images(pixels), network, other, resolution=32, progress=False)
    renamed.write_bytes(other.read_bytes())
    shutil.copy(suite.reference_file(), moved / "emoji.safetensors")
    assert for_reference(suite, renamed).label == "emoji@2+reference=b.safetensors"
    changed = for_reference(suite, other)
    assert changed.label == "emoji@2+reference=emoji.safetensors" and changed.second_features is None
    assert changed.derive(n=50).label == f"{changed.label}+n=50"
    same = for_reference(suite, moved / "emoji.safetensors")
    assert same.label == "emoji@2" and same.second_features == suite.second_features
    assert suite_sha256(same) == suite_sha256(suite) != suite_sha256(changed)
    # A suite whose reference is not here is told where it lies.
    away = load_suite("cifar10-50k")
    assert for_reference(away, other).label == f"{away.label}+reference=emoji.safetensors"
    (tmp_path / away.reference).write_bytes(b"x")
    assert for_reference(away, tmp_path / away.reference).label == away.label


def test_the_number_of_images_is_the_suites_or_an_error() -> None:
    """Of images whose number is not known before; a suite with a fixed n takes no more and no fewer."""
    pixels, suite = emoji_images()[:30], load_suite("emoji-quick").changed({"n": 20, "kid": False})
    report = evaluate_images(iter(pixels[:20]), suite, batch=8, progress=False)
    direct = evaluate_images(pixels[:20], suite, batch=20, progress=False)
    assert report.n == 20 and report.scores[0].fd == pytest.approx(direct.scores[0].fd, rel=1e-6)
    assert report.protocol == direct.protocol and report.protocol["suite_sha256"] == suite_sha256(suite)
    with pytest.raises(UserError, match="17 of the 20 images that the suite asks can be used"):
        evaluate_images(iter(pixels[:17]), suite, progress=False)
    with pytest.raises(UserError, match="more than the 20 images"):
        evaluate_images(iter(pixels), suite, batch=10, progress=False)
    with pytest.raises(UserError, match=r"torch.float32 \[4, 3, 8, 8\] with NaN; give batches uint8"):
        score_images([torch.full((4, 3, 8, 8), float("nan"))], ["a"] * 4, suite)
    with pytest.raises(UserError, match="leaves n or resolution open"):
        evaluate("emoji", load_suite("folder"))
    with pytest.raises(UserError, match="clip_score needs n"):
        suite.changed({"n": 0})
    assert network_of("emoji", "clean", "cpu").name == "emoji"
