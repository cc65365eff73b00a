"""Your own metrics: the page's example from its text to a report, what is refused, and what is left out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stepdistill.cli.listing import copy_shipped
from stepdistill.comparison.differences import differences
from stepdistill.errors import UserError
from stepdistill.evaluation import teacher_scores as teacher_cache
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.given_images import evaluate_images
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import suite_sha256
from stepdistill.metrics.colours import hue_of
from stepdistill.metrics.frechet import Moments
from stepdistill.networks.loading import load_pipeline
from stepdistill.system.emoji import emoji_images, teacher_folder
from stepdistill.system.python_files import module_of
from stepdistill.system.shipped import suite_files
from stepdistill.training.run_report import read_report

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend" / "own_metric.md").read_text()
METRIC, LINE = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S)[1] for kind in ("python", "yaml"))

SPREAD = """
import torch

class Spread:
    name, better, needs = "spread", "lower", ("features", "prompts", "reference")

    def compute(self, drawn, reference):
        assert len(drawn.prompts) == drawn.count == len(drawn.features) and drawn.images is None
        torch.testing.assert_close(reference.features.double().mean(0), reference.mean, rtol=1e-4, atol=1e-5)
        return float((drawn.features.mean(0) - reference.mean).norm()), None
"""


def suite_of(folder: Path, **changes: Any) -> Path:
    """The quick suite with 6 images, as a file of its own."""
    plain = load_suite("emoji-quick").model_dump(exclude_defaults=True) | {"name": "mine", "n": 6}
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(plain | changes))
    return file


def images(count: int = 6) -> Any:
    return list(emoji_images()[:count])


def test_the_pages_example_is_in_report_table_and_page(tmp_path: Path) -> None:
    (tmp_path / "sharpness.py").write_text(METRIC)
    suite = suite_of(tmp_path, **yaml.safe_load(LINE))
    report = evaluate_images(images(), suite, progress=False, output=tmp_path / "out")
    grey = torch.from_numpy(emoji_images()[:6].copy()).float().mean(-1) / 255
    own = (grey[:, :, 1:] - grey[:, :, :-1]).square().mean((1, 2)).double()
    scores = json.loads((tmp_path / "out" / "report.json").read_text())
    assert scores["scores"]["0"]["sharpness"] == pytest.approx(float(own.mean()), rel=1e-6)
    assert scores["scores"]["0"]["sharpness_se"] == pytest.approx(float(own.std()) / 6**0.5, rel=1e-6)
    assert (
        scores["better"] == {"sharpness": "higher"}
        and len(scores["protocol"]["metric_sharpness_sha256"]) == 64
    )
    assert "| sharpness |" in report.markdown() and "±" in report.markdown().splitlines()[2].split("|")[-4]
    assert "sharpness (higher is better)" in (tmp_path / "out" / "report.html").read_text()


def test_features_prompts_and_reference_come_as_asked_and_no_other_score_moves(tmp_path: Path) -> None:
    (tmp_path / "spread.py").write_text(SPREAD)
    plain = load_suite(suite_of(tmp_path))
    with_own = plain.changed({"metrics": ("./spread.py",)})
    first = {
        name: evaluate_images(images(), suite, progress=False)
        for name, suite in (("a", plain), ("b", with_own))
    }
    a, b = (first[name].scores[0] for name in "ab")
    assert (a.fd, a.kid, a.clip_score, a.own) == (b.fd, b.kid, b.clip_score, {}) and not b.own_missing
    assert b.own["spread"] > 0 and b.own["spread_se"] is None
    assert suite_sha256(plain) == suite_sha256(with_own)
    keys = {teacher_cache.key("weights", suite, 1, 1.0) for suite in (plain, with_own)}
    assert len(keys) == 2

    (tmp_path / "spread.py").write_text(SPREAD + "# another")
    first["c"] = evaluate_images(images(), with_own, progress=False)
    for name, report in first.items():
        report.save(tmp_path / f"{name}.json")
    found = differences([read_report(tmp_path / f"{name}.json") for name in "bc"])
    assert len(found) == 1 and found[0].startswith("protocol.metric_spread_sha256 differs")
    assert differences([read_report(tmp_path / f"{name}.json") for name in "ac"]) == []


def test_a_mended_metric_reads_the_images_that_were_drawn(tmp_path: Path) -> None:
    (tmp_path / "sharpness.py").write_text(METRIC.replace("found.value", "found.valu"))
    pipe = load_pipeline(teacher_folder("emoji"), "cpu")[0]
    suite, out = suite_of(tmp_path, metrics=["./sharpness.py"]), tmp_path / "out"
    assert not evaluate(pipe, suite, steps=1, progress=False, output=out).scores[1].own
    stamps = [file.stat().st_mtime_ns for file in out.glob("steps_1/images_*")]
    (tmp_path / "sharpness.py").write_text(METRIC)
    assert evaluate(pipe, suite, steps=1, progress=False, output=out).scores[1].own["sharpness"] > 0
    assert [file.stat().st_mtime_ns for file in out.glob("steps_1/images_*")] == stamps and stamps


def test_an_error_in_compute_leaves_the_other_scores(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(METRIC.replace("return found", "return 1 / 0, found"))
    (tmp_path / "nan.py").write_text(
        "class Nan:\n    name, better, needs = 'nan', 'lower', ()\n"
        "    def compute(self, drawn, reference):\n        return float('nan'), None\n"
    )
    suite = suite_of(tmp_path, metrics=["./bad.py", "./nan.py"])
    report = evaluate_images(images(), suite, progress=False)
    assert report.scores[0].fd is not None and report.scores[0].own == {}
    assert report.not_computed["sharpness"] == "bad.py: ZeroDivisionError: division by zero"
    assert report.not_computed["nan"].startswith("nan.py: ValueError: compute gave nan")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module", "it cannot be imported: ModuleNotFoundError"),
        ("x = undefined", "it cannot be imported: NameError"),
        ("x = 1", "it must hold one class with a function compute; found none"),
        (METRIC.replace('"sharpness"', '"Sharp ness"'), "name is 'Sharp ness': give small letters"),
        (METRIC.replace('"higher"', '"more"'), "better is 'more': give 'lower', 'higher' or 'neither'"),
        (METRIC.replace('("images",)', '"images"'), "needs is 'images': give a tuple of features, images"),
        (
            METRIC.replace("drawn: DrawnImages, reference: RealImages", "drawn"),
            "compute must take (self, drawn",
        ),
        (METRIC.replace('"sharpness"', '"fd"'), "two metrics are called fd"),
    ],
)
def test_a_file_that_is_no_metric_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_suite(suite_of(tmp_path, metrics=["./mine.py"]))
    assert "mine.py" in str(error.value) or "fd" in said
    assert "\n" not in str(error.value)


def test_what_a_suite_lacks_for_a_metric_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "spread.py").write_text(SPREAD)
    (tmp_path / "sharpness.py").write_text(METRIC)
    cases = {
        "spread needs prompts": {"metrics": ["spread.py"], "prompts": None, "clip_score": False},
        "sharpness needs images of one size": {"metrics": ["sharpness.py"], "resolution": 0},
        "two metrics are called spread": {"metrics": ["spread.py", "./spread.py"]},
        "there is no such file": {"metrics": ["absent.py"]},
        "metrics has cmmd, which is a key with a value: write cmmd: clip": {"metrics": ["cmmd"]},
        "did you mean kid?": {"metrics": ["kidd"]},
        "metrics has kid, and kid is false": {"metrics": ["kid"], "kid": False},
    }
    for said, changes in cases.items():
        with pytest.raises(UserError, match=re.escape(said)):
            load_suite(suite_of(tmp_path, **changes))


def test_shipped_metrics_are_named_in_the_same_list(tmp_path: Path) -> None:
    (tmp_path / "sharpness.py").write_text(METRIC)
    named = load_suite(suite_of(tmp_path, metrics=["fid_infinity", "./sharpness.py"], clip_score=False))
    assert named.fid_infinity and named.metrics == ("./sharpness.py",)
    assert named == load_suite(suite_of(tmp_path, fid_infinity=True, clip_score=False)).changed(
        {"metrics": ["./sharpness.py"]}
    )


def test_a_copied_suite_is_the_shipped_one_under_its_own_name_with_every_key(tmp_path: Path) -> None:
    for name, file in suite_files().items():
        copy_shipped(name, str(tmp_path / f"my_{name}.yaml"))
        text = (tmp_path / f"my_{name}.yaml").read_text()
        mine, shipped = load_suite(tmp_path / f"my_{name}.yaml"), load_suite(name)
        assert mine == shipped.model_copy(
            update={"name": f"my_{name}", "version": 1, "adds_to": None, "folder": mine.folder}
        )
        lines = [line for line in text.splitlines() if ": " in line and "  # " in line]
        keys = set(Suite.model_fields) - {"folder", "derived"}
        assert {line.removeprefix("# ").partition(":")[0] for line in lines} == keys
        # A default that is commented in has its own value.
        plain = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
        assert {key: plain[key] for key in keys - yaml.safe_load(file.read_text()).keys()} == {
            key: json.loads(json.dumps(Suite.model_fields[key].default))
            for key in keys - yaml.safe_load(file.read_text()).keys()
        }
    with pytest.raises(UserError, match=r"emojy is not a shipped recipe or suite .did you mean emoji"):
        copy_shipped("emojy", str(tmp_path / "x.yaml"))


def test_the_moments_that_compute_gets_are_those_of_the_reference() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Moments.of(x).covariance, torch.cov(x.double().T))


def test_high_frequencies_and_hits_of_colours_are_shipped(tmp_path: Path) -> None:
    """Filled squares: two have the hue that is asked for, one has another, one is asked for none and does not count. A
    square of 16 of 32 pixels has its share of high frequencies in closed form of the transform."""
    asked = ["red square", "large blue square", "green book", "keycap: *"]
    painted = [(220, 30, 40), (40, 120, 200), (220, 30, 40), (0, 0, 0)]
    pictures = np.full((4, 32, 32, 3), 255, np.uint8)
    for picture, colour in zip(pictures, painted, strict=True):
        picture[8:24, 8:24] = colour
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    wanted = ["colour_hits", "high_frequencies"]
    suite = suite_of(tmp_path, n=4, prompts="asked.txt", selection="first", metrics=wanted, neighbours=0)
    report = evaluate_images(list(pictures), suite, progress=False, output=tmp_path / "out")
    found = report.scores[0].own
    assert found["colour_hits"] == pytest.approx(2 / 3)
    side = np.abs(np.fft.fft(np.repeat([0, 1, 0], [8, 16, 8]))) ** 2
    low = np.abs(np.fft.fftfreq(32)) <= 0.25
    share = 1 - (side[low].sum() ** 2 - side[0] ** 2) / (side.sum() ** 2 - side[0] ** 2)
    assert found["high_frequencies"] == pytest.approx(share, rel=1e-4)
    assert report.better == {"colour_hits": "higher", "high_frequencies": "neither"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "colour hits (higher is better)" in page and "neither" not in page
    with pytest.raises(UserError, match="did you mean high_frequencies"):
        load_suite(suite_of(tmp_path, metrics=["high_frequency"]))


def test_prompts_to_train_colours_on_hold_out_what_is_measured() -> None:
    suite = load_suite("emoji-colours")
    asked = set(suite.prompt_list() or ())
    trained = module_of(str(ROOT / "train" / "examples" / "colours.py"), "example").training_prompts()
    assert len(asked) == 24 and not asked & set(trained)
    assert not any(math.isnan(hue_of(prompt)) for prompt in asked)
    assert [math.isnan(hue_of(prompt)) for prompt in trained[:4]] == [True, False, True, False]
