"""The page of an evaluation, the real images nearest to drawn ones, and evaluations compared."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.comparison.collect import collect, write_all
from stepdistill.comparison.page import html_page as comparison_page
from stepdistill.comparison.ranking import rank, ranks
from stepdistill.comparison.table import text_table
from stepdistill.errors import UserError
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.gallery import FILE, Gallery, load_galleries
from stepdistill.evaluation.nearest_real import between_real, nearest, real_images
from stepdistill.evaluation.page import html_page, write_page
from stepdistill.evaluation.reference import load_reference
from stepdistill.evaluation.reference_files import read_reference
from stepdistill.evaluation.scores import Report, StepScores
from stepdistill.evaluation.statistics import make_statistics
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.evaluation.suite_identity import suite_sha256
from stepdistill.features.load import network_of
from stepdistill.networks.loading import load_pipeline
from stepdistill.pages.numbers import with_error
from stepdistill.system.emoji import emoji_images, teacher_folder
from stepdistill.training.run_report import read_report

COPIED = (1234, 77)
"""Real images that stand among the drawn ones, at places 3 and 5."""


def tiny(**changes: Any) -> Suite:
    return load_suite("emoji-quick").model_copy(update={"n": 20, **changes})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """An evaluation of the embedded teacher at 1 and 2 steps, in whose pictures two are then replaced by real ones."""
    folder, suite = tmp_path_factory.mktemp("evaluation"), tiny()
    pipe, _ = load_pipeline(teacher_folder("emoji"), "cpu")
    report = evaluate(pipe, suite, steps=[1, 2], trailing=True, progress=False, output=folder)
    assert (folder / "report.html").is_file()
    copies = torch.from_numpy(emoji_images()[list(COPIED)]).permute(0, 3, 1, 2)
    rows = suite.network().images(copies)
    for steps, gallery in load_galleries(folder).items():
        gallery.pixels[[3, 5]], gallery.features[[3, 5]] = copies, rows
        gallery.save(folder / f"steps_{steps}" / FILE)
    return report, folder


def test_the_page_holds_every_number_and_fetches_nothing(evaluated: tuple[Report, Path]) -> None:
    report, folder = evaluated
    page = write_page(report, folder).read_text()
    for scores in report.scores.values():
        for name, value in scores.values().items():
            assert value is None or repr(value) in page, name
    for fact in (*report.protocol.values(), *report.versions.values(), report.hardware):
        assert html.escape(str(fact)) in page
    assert "FD-emoji against steps" in page and "CLIP-emoji against steps" in page
    assert not re.search(r"https?:|<link|<script|url\((?!#)|@import", page)
    assert set(re.findall(r'src="([^,"]*)', page)) == {"data:image/png;base64"}
    drawn, looked_up, extremes = 2 * 20, 2 * 16 * 4, 2 * 16
    assert page.count("<img") == drawn + looked_up + extremes
    prompts = tiny().prompt_list()
    assert prompts is not None and all(prompt in page for prompt in prompts)
    again = write_page(report, folder, tiny()).read_text()
    assert again == page


def test_copies_of_real_images_are_seen_on_the_page(evaluated: tuple[Report, Path]) -> None:
    report, folder = evaluated
    page = write_page(report, folder).read_text()
    copies = re.findall(r'<figure class="close"><img alt="real image (\d+)"[^>]*>(0\.00\d)<', page)
    assert copies and {COPIED[0], COPIED[1]} <= {int(place) for place, _ in copies}
    assert [float(distance) for place, distance in copies if int(place) in COPIED] == pytest.approx(
        [0] * 4, abs=1e-3
    )


def test_warnings_and_what_is_missing_stand_on_the_page(evaluated: tuple[Report, Path]) -> None:
    """Also without pictures, with a reference that is gone, and with names that are no HTML."""
    report, folder = evaluated

    class Warned(Report):
        def to_dict(self) -> dict[str, Any]:
            more = {"warnings": ["n < <2,048>"], "not_computed": {"fid_infinity": "no weights & no hope"}}
            return super().to_dict() | more

    warned = Warned(**{name: getattr(report, name) for name in vars(report)})
    page = html_page(replace(warned, pipeline="<b>"), {})
    assert "n &lt; &lt;2,048&gt;" in page and "FID-infinity: no weights &amp; no hope" in page
    assert "<h1>&lt;b&gt;</h1>" in page and "<img" not in page
    moved = replace(report, protocol={**report.protocol, "reference_sha256": "0"})
    galleries = load_galleries(folder)
    assert "Not shown: the reference is another one now" in html_page(moved, galleries)
    unknown = replace(report, suite="mine@1")
    assert "Not shown: no suite &#x27;mine&#x27;" in html_page(unknown, galleries)


def test_the_features_of_a_reference_are_in_the_order_of_its_images(tmp_path: Path) -> None:
    """The nearest real image of a real image is itself, for the embedded images and for a folder's."""
    suite, images = load_suite("emoji"), emoji_images()
    network = suite.network()
    shipped = load_reference(suite, network)
    assert shipped.features is not None
    places = list(range(0, 3781, 97))
    found = nearest(network.images(torch.from_numpy(images[places]).permute(0, 3, 1, 2)), shipped.features, 1)
    assert found.distances.max() < 1e-3
    for place, other in zip(places, found.indices[:, 0].tolist(), strict=True):
        assert np.array_equal(images[place], images[other])  # some emoji are drawn twice
    from stepdistill.data.image_archives import open_images

    for i in range(12):  # 10.png follows 9.png
        Image.fromarray(images[40 * i]).save(tmp_path / f"{i}.png")
    file = tmp_path / "mine.safetensors"
    make_statistics(open_images(tmp_path, resolution=32), network_of("emoji", "clean"), file, resolution=32)
    mine = read_reference(file)
    assert mine.features is not None
    pictures = real_images(mine, {2, 10})
    assert np.array_equal(pictures[2], images[80]) and np.array_equal(pictures[10], images[400])
    row = network.images(torch.from_numpy(pictures[10].copy())[None].permute(0, 3, 1, 2))
    assert nearest(row, mine.features, 1).indices.item() == 10
    Image.fromarray(images[1]).save(tmp_path / "5.png")
    with pytest.raises(UserError, match="not those that the reference was made of"):
        real_images(mine, {2})
    (tmp_path / "5.png").unlink()
    with pytest.raises(UserError, match="not those that the reference was made of"):
        real_images(mine, {2})


def test_nearest_of_points_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    found = nearest(torch.tensor([[1.9], [7.0]]), real, 2)
    assert found.indices.tolist() == [[1, 2], [3, 2]]
    torch.testing.assert_close(
        found.distances, torch.tensor([[0.9, 1.1], [0.0, 4.0]]).double(), rtol=0, atol=1e-6
    )
    assert between_real(real).tolist() == [1, 1, 2, 4]


def test_a_number_is_written_to_the_second_digit_of_its_error() -> None:
    assert with_error(1.23456, 0.0123) == "1.235 ± 0.012" and with_error(123.4, 45.0) == "123 ± 45"
    assert with_error(0.00123456, None) == "0.001235" and with_error(2.0, 0.0, "{:.3f}") == "2.000"
    # What rounding leaves of a distance of 0 has no sign.
    assert with_error(-5.8e-14, None, "{:.2f}") == "0.00" and with_error(-1e-9, 0.01) == "0.000 ± 0.010"
    assert with_error(-0.006, None, "{:.2f}") == "-0.01" and with_error(-0.3, 0.02) == "-0.300 ± 0.020"


def saved(report: Report, file: Path, **scores: float) -> str:
    """The report in a file, with other scores at its first step count."""
    content = report.to_dict()
    content["scores"][min(content["scores"])] |= scores
    file.write_text(json.dumps(content))
    return str(file)


def test_evaluations_given_by_their_folders_show_their_pictures(
    evaluated: tuple[Report, Path], tmp_path: Path
) -> None:
    report, folder = evaluated
    compared = collect([str(folder), saved(report, tmp_path / "b.json")], "command")
    assert [row.name for row in rank(compared.reports)] == [folder.name, "b"] * 2
    page = write_all(compared, tmp_path / "out").read_text()
    assert page.count("data:image/png") == 2 and "The first images, 32 x 32" in page  # a row each
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.size == (12 * (64 + 2) + 2, 2 * (64 + 16 + 2) + 2)  # 1 and 2 steps


def test_two_evaluations_are_ranked_and_close_ones_are_not_told_apart(
    evaluated: tuple[Report, Path], tmp_path: Path
) -> None:
    """Command, machine, versions, commit and times do not matter."""
    report, _ = evaluated
    other = replace(
        report, command="x", hardware="y", versions={"torch": "1"}, commit=None, pipeline="another"
    )
    a = saved(report, tmp_path / "a.json", fd=3.0, fd_se=0.2)
    b = saved(other, tmp_path / "b.json", fd=2.7, fd_se=0.2, seconds_per_image=9.0)
    c = saved(other, tmp_path / "c.json", fd=2.0, fd_se=0.01)
    compared = collect([a, b, c], "command")
    rows = rank(compared.reports)
    assert [row.name for row in rows if row.steps == 1] == ["c", "b", "a"]
    assert [ranks(row, rows) for row in rows if row.steps == 1] == [(1, 1), (2, 3), (2, 3)]
    text = text_table(rows)
    assert "2.70 ± 0.20" in text and re.search(r"^a +\S+ +1 +2-3 ", text, re.M) and "A rank such as" in text
    page = comparison_page(compared)
    assert "<td>2-3</td>" in page and "3.00 ± 0.20" in page and "Gap closed" not in page
    write_all(compared, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    scores = numbers["runs"][0]["scores"]["1"]
    assert scores["fd_se"] == 0.2 and scores["rank"] == [2, 3]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n": 10}, r"n differs: 20 .a., 10 .b."),
        ({"protocol": {"resize": "tf1"}}, r"protocol.resize differs: clean .*.a., tf1 .b."),
        (
            {"protocol": {"reference_sha256": "0" * 64}},
            r"protocol.reference_sha256 differs: \w{16}\.\.\. .a., 0{16}",
        ),
        ({"protocol": {"seeds": "others"}}, "protocol.seeds differs: image i.* .a., others .b."),
        ({"protocol": {"a_new_field": "1"}}, None),
        ({"protocol": {"diversity": "8 samples of 100 prompts"}}, None),
    ],
)
def test_evaluations_of_different_protocols_are_refused(
    evaluated: tuple[Report, Path], tmp_path: Path, change: dict[str, Any], field: str | None
) -> None:
    report, _ = evaluated
    protocol = {**report.protocol, **change.pop("protocol", {})}
    a = read_report(saved(report, tmp_path / "a.json"))
    b = read_report(saved(replace(report, protocol=protocol, **change), tmp_path / "b.json"))
    if field is None:
        assert len(rank([a, b])) == 4
        return
    with pytest.raises(UserError, match=field) as caught:
        rank([a, b])
    assert "\n" not in str(caught.value)


def test_every_field_that_differs_is_named(evaluated: tuple[Report, Path], tmp_path: Path) -> None:
    """Other prompts are another hash of the suite; n and resize are named as well, and a hash that is not stated."""
    report, _ = evaluated
    suite = tiny(prompts=str(tmp_path / "prompts.txt"))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert suite_sha256(suite) != report.protocol["suite_sha256"]
    protocol = {**report.protocol, "suite_sha256": suite_sha256(suite), "resize": "tf1"}
    del protocol["features_sha256"]
    a = read_report(saved(report, tmp_path / "a.json"))
    b = read_report(saved(replace(report, protocol=protocol, n=19), tmp_path / "b.json"))
    with pytest.raises(UserError) as caught:
        rank([a, b])
    for field in ("n differs", "protocol.resize", "protocol.suite_sha256", "not stated (b)"):
        assert field in str(caught.value)


def test_a_run_and_an_evaluation_of_one_protocol_are_ranked(
    evaluated: tuple[Report, Path], tmp_path: Path
) -> None:
    report, _ = evaluated
    a = read_report(saved(report, tmp_path / "a.json", fd=3.0))
    run: dict[str, Any] = {
        "suite": report.suite,
        "n": report.n,
        "method": "dmd",
        "student": {"fd": {"1": 2.0}, "clip_score": {}},
        "protocol": dict(report.protocol),
        "verification": "verified",
        **dict.fromkeys(("train_seconds", "wall_seconds", "peak_memory_bytes"), 1),
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text(json.dumps(run))
    rows = rank([a, read_report(tmp_path / "run")])
    assert [(row.name, row.steps) for row in rows[:2]] == [("run", 1), ("a", 1)]
    run["protocol"]["features_sha256"] = "0"
    (tmp_path / "run" / "report.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match=r"protocol\.features_sha256 differs"):
        rank([a, read_report(tmp_path / "run")])


def test_images_without_prompts_have_a_page(evaluated: tuple[Report, Path]) -> None:
    report, _ = evaluated
    blank = StepScores(**{**vars(report.scores[1]), "clip_score": None, "kid": None, "kid_se": None})
    images = replace(
        report, scores={0: blank}, guidance=None, images={"source": "x", "skipped": [{"name": "a"}]}
    )
    gallery = Gallery(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), None, torch.zeros(2, 64))
    page = html_page(images, {0: gallery})
    assert "image 1" in page and "against steps" not in page and "name: a" in page and "Best" not in page
