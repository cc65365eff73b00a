"""The page of a run: what stands on it, in each state of a run, and what its curves are of."""

from __future__ import annotations

import html
import json
import re
import shlex
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from run_folders import rows, sheet, write_run, write_status

from stepdistill.cli import app
from stepdistill.methods.dmd import DMD
from stepdistill.pages.numbers import duration
from stepdistill.pages.plots import Phase
from stepdistill.pages.sheets import read_sheet
from stepdistill.pages.style import STYLE
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training import run_curves
from stepdistill.training.identity import changed_keys, changes, resolve, resolved_yaml
from stepdistill.training.run_page import run_page
from stepdistill.training.run_record import is_run, read_run

TWO_HOURS_AGO = "two hours ago"


def test_a_finished_runs_page_says_what_it_came_to_how_it_went_and_what_to_do_next(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "my run", "finishing", report=True)
    page = run_page(read_run(folder, "runs/my run"))
    titles = "Student and teacher|Training|Previews|Scores|Recipe|Next|Files|Where the numbers come from"
    assert re.findall(r"<h2>([^<]*)</h2>", page) == titles.split("|")
    text = re.sub(r"<[^>]*>", " ", page)
    for said in (
        "0.750",
        "0 is the teacher with one step, 1 the teacher with 25. Measured against the teacher&#x27;s pictures.",
        "In all, 12 updates. The last part of the run took 2 min 56 s.",
        "3.0 GiB",
        "Diversity 0.25 (teacher 0.30), saturation 10% (teacher 20%). 1 warning while it trained",
        "14 files unaltered",
        "2.00 ± 0.12",
        "a &lt;machine&gt;",
        "DMD2: &lt;two&gt; scores.",
        "update 4: collapse: too &lt;alike&gt;",
        "What is not at its default: 2 keys",
        "Lower is better: FD-emoji, KID. Gap closed: 0 is the teacher with one step",
        "Read &lt;KID&gt;.",
        "after 5 updates by stepdistill train --resume",
        "the teacher&#x27;s own: 3,781, sha256 abababababababab",
        "warm start, updates 0 to 4; matching, updates 4 to 12",
        "warm start: 1 at its start, 0.7 at its end; matching: 2 at its start, 2 at its end.",
        "stepdistill sample &#x27;runs/my run&#x27; &#x27;a &lt;red&gt; apple&#x27;",
        "stepdistill compare &#x27;runs/my run&#x27; OTHER_RUN",
    ):
        assert said in text, said
    assert page.count("<svg role=img") == 8  # two losses, diversity, saturation, norms, times; field, rate
    assert page.count("data:image/png;base64") == 3 + 4  # samples; three previews and the teacher
    assert 'alt="student, 1 step: a &lt;red&gt; apple, a boat"' in page
    assert not re.search(r"https?:|<link|<script|url\((?!#)|@import", page)
    for name in re.findall(r'<a href="([^"]*)"', page):
        assert (folder / name).exists(), name
    lines = re.findall(r"<code>(stepdistill [^<]*)</code>", page)
    assert len(lines) == 7
    for _, verb, *words in (shlex.split(html.unescape(line)) for line in lines):
        given = (
            typer.main.get_command(app).commands[verb].make_context(verb, words).params
        )  # each is taken as it is
        assert any("runs/my run" in str(value) for value in given.values())
    boxed = re.sub(r"<div class=scroll .*?</div>", "", page, flags=re.DOTALL)
    assert "<table" in page and "<table" not in boxed  # none is cut on a narrow screen


@pytest.mark.parametrize(
    ("state", "changes", "said"),
    [
        ("preparing", {"phase": "drawing pairs", "update": 0}, "preparing|Drawing pairs."),
        ("training", {}, "training|Update 8 of 12, about 1 min 30 s left."),
        ("stopped", {"phase": "the loss is nan"}, "stopped|Stopped after 8 of 12 updates: the loss is nan"),
        (
            "training",
            {"pid": 2**22 + 1},
            "killed|Its process is gone. Its last word was: training, update 8 of 12.",
        ),
        ("training", {"host": "elsewhere"}, "training|Update 8 of 12"),
        (
            "training",
            {"host": "elsewhere", "written": TWO_HOURS_AGO},
            "silent|No word for 2 h from elsewhere.",
        ),
        (None, {}, "not known|there is no status.json"),
    ],
)
def test_a_run_that_is_not_done_says_where_it_is(
    state: str | None, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", state, stats=False)
    if state:
        if changes.get("written") == TWO_HOURS_AGO:
            changes = {**changes, "written": (datetime.now(UTC) - timedelta(hours=2)).isoformat()}
        write_status(folder, state, **changes)
    run = read_run(folder)
    page, (word, sentence) = run_page(run), said.split("|")
    assert run.state == word and sentence in page and "<h2>Scores" not in page
    going = word in ("training", "preparing")
    again = f"stepdistill train {folder}/recipe.yaml --output {folder}"
    assert run.going == going and (again in page) != going and "stepdistill export" not in page
    (folder / "work" / "checkpoints" / "one").mkdir(parents=True)
    page = run_page(run)
    assert (f"stepdistill train --resume --output {folder}" in page) != going and again not in page
    assert f"stepdistill export {folder}" in page


def test_a_report_of_before_is_not_shown_as_that_of_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "training", stats=False, report=True)
    assert "0.750" not in run_page(read_run(folder)) and not read_run(folder).done
    write_status(folder, "done")
    assert "0.750" in run_page(read_run(folder)) and read_run(folder).state == "finished"
    (folder / "status.json").unlink()
    assert read_run(folder).state == "finished"


def test_the_time_of_a_run_that_was_not_resumed_is_the_whole_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "done", report=True)
    report = json.loads((folder / "report.json").read_text()) | {"resumes": []}
    (folder / "report.json").write_text(json.dumps(report))
    text = re.sub(r"<[^>]*>", " ", run_page(read_run(folder)))
    assert "2 min 56 s" in text and "1 min of it training, 12 updates." in text


def test_what_is_half_written_or_of_an_earlier_version_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "training", stats=False, report=True)
    for name in ("report.json", "status.json", "recipe.yaml"):
        (folder / name).write_text("{")
    (folder / "pictures" / "samples.png").write_bytes(sheet("teacher", "student")[:60])
    (folder / "stats.jsonl").write_text('{"step": 0, "turn": "student", "loss": 1.0}\n')
    run = read_run(folder)
    assert (run.report, run.recipe, run.status, run.samples()) == ({}, {}, None, None)
    assert "columns of an earlier version" in run_page(run)
    assert is_run(folder) and not is_run(tmp_path)


def test_previews_in_the_strip_are_spread_and_the_last_is_among_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", stats=False)
    for update in range(10, 210, 10):
        (folder / "pictures" / f"{update:06d}.png").write_bytes(sheet("teacher", "student"))
    assert list(read_run(folder).previews(1)) == [200]
    found = list(read_run(folder).previews(5))
    assert found == [10, 60, 100, 150, 200]


def test_phases_are_the_stretches_that_the_method_named() -> None:
    assert run_curves.phases_of(rows()) == [Phase("warm start", 0, 4), Phase("matching", 4, 12)]
    assert run_curves.phases_of(rows(), updates=20)[-1] == Phase("matching", 4, 20)
    assert run_curves.phases_of(rows(3)) == [] == run_curves.phases_of([])


def test_curves_are_means_within_one_phase_and_times_leave_previews_out() -> None:
    points = [(float(x), 1.0 if x < 301 else 3.0) for x in range(1000)]
    curve = run_curves._curve("a", points, [Phase("one", 0, 301), Phase("two", 301, 1000)])
    assert len(curve.points) <= run_curves.POINTS + 2 and {y for _, y in curve.points} == {1.0, 3.0}
    assert all(low == high == y for (_, y), (low, high) in zip(curve.points, curve.band, strict=True))
    # Ten seconds of each preview fall into the update after it.
    charts = run_curves.curves(rows())
    (time,) = [chart for chart in charts if "<figcaption>Time of an update" in chart]
    assert "student: 500 at update 1, 500 at 11; fake score: 500 at update 6, 500 at 10." in time
    head, lines = run_curves.numbers_of_curves(rows(), 3)
    assert head[:2] == ["updates", "loss, student"] and [line[:2] for line in lines] == [
        ["1 to 4", "0.85"],
        ["5 to 8", "2"],
        ["9 to 12", "2"],
    ]


def test_a_sheets_rows_are_read_back_to_the_pixel() -> None:
    found = read_sheet(sheet("teacher", "student"))
    assert found is not None and [row.label for row in found.rows] == ["teacher", "student"]
    assert found.prompts == ("a <red> apple", "a boat")
    for i, row in enumerate(found.rows):
        assert [picture.size for picture in row.pictures] == [(64, 64)] * 2
        assert {picture.getcolors()[0] for picture in row.pictures} == {(64 * 64, (40 * (i + 1),) * 3)}
    assert read_sheet(b"no picture") is None


def test_a_recipe_written_out_names_what_is_not_at_its_default() -> None:
    resolved = resolve(
        load_recipe(None, method="lcm", teacher="mine", sets=["train.lr=0.5", "options.guidance=7.25"])
    )
    text = resolved_yaml(resolved)
    assert changes(resolved) == {"options.guidance": 7.25, "train.lr": 0.5}
    assert changed_keys(text) == ("options.guidance", "train.lr")
    plain = resolved_yaml(resolve(load_recipe(None, method="lcm", teacher="mine")))
    assert changed_keys(plain) == () == changed_keys("teacher: emoji\n")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.042, "0.042 s"),
        (45, "45 s"),
        (60, "1 min"),
        (176, "2 min 56 s"),
        (12000, "3 h 20 min"),
        (180000, "2 d 2 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out_from_their_ground(scheme: str) -> None:
    """By WCAG: text by 4.5, lines of charts by 3."""
    light, dark = STYLE.split("prefers-color-scheme:dark")
    found = dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", dark if scheme == "dark" else light))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(found[one]), luminance(found[other])))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "muted", "link", "good", "bad"):
        assert contrast(text, "paper") >= 4.5 and contrast(text, "soft") >= 4.5, text
    for kind in ("good", "warn", "bad"):
        assert contrast(kind, f"{kind}-soft") >= 4.5, kind
    for i in range(10):
        assert contrast(f"c{i}", "paper") >= 3, i


def test_methods_with_two_scores_name_what_each_update_is_for() -> None:
    options = DMD.Options(warm_start=3, fake_warm_start=2)
    assert [options.phase(step, options.warm_start) for step in (0, 2, 3, 4, 5, 99)] == [
        *["warm start"] * 2,
        *["fake score alone"] * 2,
        *["matching"] * 2,
    ]
    assert DMD.Options().phase(0, 0) == "matching"
