"""Runs side by side: what is ranked, what is refused, the page, the plan, and real runs that fail, stop and go on."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stepdistill.cli import main
from stepdistill.comparison import ranking as compare
from stepdistill.comparison import train_all as side_by_side
from stepdistill.comparison.page import Comparison, as_json, html_page
from stepdistill.errors import UserError
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import recipe_files
from stepdistill.training.run_report import RunReport, read_report


def write_report(folder: Path, fd: dict[str, float], **changes: object) -> str:
    """A run folder with the report of a student that has these distances; the teacher's are 5 and 1."""
    same = dict.fromkeys(fd, 0.8)
    report: dict[str, object] = {
        "suite": "emoji@1",
        "n": 2000,
        "metrics": {"fd": "FD-emoji", "clip_score": "CLIP-emoji"},
        "student": {
            "fd": fd,
            "clip_score": same,
            "recall": same,
            "seconds_per_image": dict.fromkeys(fd, 0.002),
        },
        "teacher": {"fd": {"1": 5.0, "25": 1.0}, "clip_score": {}},
        "gap_closed": {steps: (5 - value) / 4 for steps, value in fd.items()},
        "recall_of_teachers": dict.fromkeys(fd, 0.95),
        "train_seconds": 61.0,
        "wall_seconds": 70.0,
        "verification": "verified",
        "updates": 90,
        "updates_planned": 100,
        "peak_memory_bytes": 3 * 2**20,
        "method": "dmd",
        "command": "stepdistill train <b>",
    }
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report | changes))
    return str(folder)


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> list[str]:
    """The lines that the command prints, run in this process."""
    monkeypatch.setattr(sys, "argv", ["stepdistill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), printed.err
    return printed.out.splitlines()


def test_compare_ranks_by_steps_then_distance_and_writes_page_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_report(tmp_path / "a", {"1": 3.0, "4": 1.5})
    b = write_report(tmp_path / "b", {"1": 2.0})
    (tmp_path / "b" / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "b" / "pictures" / "samples.png")
    lines = command(capsys, monkeypatch, "compare", a, b, "--output", str(tmp_path / "out"))
    same = ["0.800", "0.800", "(95%)", "2.0", "61", "s", "90", "of", "100", "3", "MiB"]
    assert [line.split() for line in lines[1:4]] == [
        ["b", "dmd", "1", "0.750", "2.000", *same],
        ["a", "dmd", "1", "0.500", "3.000", *same],
        ["a", "dmd", "4", "0.875", "1.500", *same],
    ]
    assert "density" not in lines[0]  # measured by none
    text = (tmp_path / "out" / "compare.html").read_text()
    assert text.count("data:image/png;base64,") == 1 and text.count("<svg role=img") == 2
    assert "stepdistill train &lt;b&gt;" in text
    assert "http" not in text
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["a", "b"]
    assert numbers["runs"][0]["scores"]["4"]["fd"] == 1.5 and numbers["runs"][0]["updates"] == 90
    assert numbers["teacher"]["fd"] == {"1": 5.0, "25": 1.0}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"suite": "emoji@2"}, "suite differs: emoji@1 .a., emoji@2 .b."),
        ({"n": 200}, "n differs: 2000 .a., 200 .b."),
        ({"protocol": {"features_sha256": "y"}}, "protocol.features_sha256 differs: x .a., y .b."),
    ],
)
def test_different_protocols_are_not_ranked(tmp_path: Path, change: dict[str, object], field: str) -> None:
    first = write_report(tmp_path / "a", {"1": 3.0}, protocol={"features_sha256": "x"})
    other = write_report(tmp_path / "b", {"1": 2.0}, **change)
    with pytest.raises(UserError, match=field):
        compare.rank([read_report(first), read_report(other)])


def test_results_have_a_table_for_each_teacher(tmp_path: Path) -> None:
    """Each under its own teacher's scores; the shipped reports give the shipped page to the last byte."""
    from importlib.util import module_from_spec, spec_from_file_location

    shipped = Path(__file__).resolve().parents[2] / "train"
    spec = spec_from_file_location("results", shipped / "results.py")
    assert spec is not None and spec.loader is not None
    results = module_from_spec(spec)
    spec.loader.exec_module(results)
    shutil.copytree(shipped / "results", tmp_path / "results")
    page = tmp_path / "README.md"
    before = (shipped / "README.md").read_text()
    page.write_text(before)
    results.put([], tmp_path)
    assert page.read_text() == before

    more = {
        "name": "mine",
        "teacher_name": "other-teacher",
        "guidance": 4.0,
        "wall_seconds": 90.0,
        "commit": "0123456789",
    }
    more |= {"hardware": "a machine", "teacher": {"fd": {"1": 7.5, "25": 2.25}, "clip_score": {"25": 0.5}}}
    run = write_report(tmp_path / "run", {"2": 3.0}, **more)
    (tmp_path / "run" / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "run" / "pictures" / "samples.png")
    results.put([run], tmp_path)
    assert page.read_text().startswith(before.split(results.END)[0].rstrip())
    added = page.read_text().split("Suite ")[-1]
    assert added.startswith(
        "emoji@1, 2000 images; teacher `other-teacher`, guidance 4: FD-emoji 7.50 at 1 step (at its better guidance), "
        "2.25 at 25; CLIP-emoji 0.500 at 25.\n\n| run | method |"
    )
    assert "| mine | dmd | 2 | **0.500** | 3.00 |  | 0.800 (160.0%) |" in added and "_emoji |" not in added
    assert "| mine | `stepdistill train <b>` | a machine |" in added


def test_what_eval_wrote_is_read(tmp_path: Path) -> None:
    score = {"n": 2000, "fd": 1.25, "clip_score": None, "kid": 0.1, "recall": 0.5}
    (tmp_path / "mine.json").write_text(json.dumps({"suite": "emoji@1", "n": 2000, "scores": {"2": score}}))
    (row,) = compare.rank([read_report(tmp_path / "mine.json")])
    assert (row.name, row.steps, row.fd, row.clip_score, row.gap_closed) == ("mine", 2, 1.25, None, None)
    assert (row.kid, row.recall) == (0.1, 0.5)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        write_report(tmp_path / place / "run", {"1": 2.0}, name="run")
    compared = side_by_side.collect([str(tmp_path / place / "run") for place in ("x", "y")], "c")
    assert len({row.name for row in compare.rank(compared.reports)}) == 2
    assert [len(run["scores"]) for run in as_json(compared)["runs"]] == [1, 1]


def test_a_page_without_a_finished_run_says_what_failed() -> None:
    page = html_page(Comparison([], [], {"sim": "a loss of <NaN>"}, ["scm"]))
    assert "sim: a loss of &lt;NaN&gt;" in page and "No recipe for: scm" in page


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), ("m", None), ("0s", None)]
)
def test_budgets(text: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(UserError, match="give a time such as 90s, 10m or 1h"):
            side_by_side.seconds_of(text)
    else:
        assert side_by_side.seconds_of(text) == seconds


def test_all_plans_one_recipe_a_method_and_names_the_methods_without() -> None:
    wanted = side_by_side.plan("all", "emoji", 600, ["train.batch=8"])
    from stepdistill.system.shipped import module_summaries

    methods = [entry.recipe.method for entry in wanted.entries]
    assert len(set(methods)) == len(methods)
    assert {*methods, *wanted.without_recipe} == set(module_summaries("methods"))
    assert {"dmd", "lcm", "reflow"} <= set(methods)
    assert all((e.recipe.train.budget_seconds, e.recipe.train.batch) == (600, 8) for e in wanted.entries)


def test_a_budget_chooses_the_recipe_that_fits_and_without_one_the_methods_own_is_taken() -> None:
    """Of DMD's recipes two trained in ten minutes when the shipped results were made, and the quick one in five."""
    assert side_by_side.recipe_of("dmd", "emoji") == "dmd_emoji"
    assert side_by_side.recipe_of("dmd", "emoji", 600) == "dmd_emoji_below_noise"
    assert side_by_side.recipe_of("dmd", "emoji", 300) == "dmd_emoji_quick"
    assert side_by_side.recipe_of("dmd", "emoji", 1) == "dmd_emoji_quick"
    assert side_by_side.recipe_of("dmd", "some/teacher") == "dmd_emoji"
    assert side_by_side.recipe_of("no_such_method", "emoji") is None


def test_what_cannot_be_planned_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dmdd is neither a method nor a recipe .did you mean dmd"):
        side_by_side.plan("dmdd", "emoji")
    only = {"lcm_emoji": recipe_files()["lcm_emoji"]}
    monkeypatch.setattr(side_by_side, "recipe_files", lambda: only)
    with pytest.raises(UserError, match=r"no recipe is shipped for sim, scm: .* there are recipes for lcm$"):
        side_by_side.plan("sim,lcm,scm", "emoji")
    mine = tmp_path / "lcm_emoji.yaml"
    mine.write_bytes(only["lcm_emoji"].read_bytes())
    with pytest.raises(UserError, match="two recipes are called lcm_emoji"):
        side_by_side.plan(f"lcm,{mine}", "emoji")


@pytest.mark.slow
def test_runs_that_fail_stop_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two recipes, one whose run folder is a file: the other is trained within its budget, drawn and put in the table;
    the same command keeps it, and another recipe of that name is refused."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    suite = {"name": "small", "version": 1, "n": 16, "prompts": "emoji", "selection": "shuffled", "resolution": 32,
             "reference": "emoji.safetensors", "teacher_steps": 8}  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(suite))
    recipe = {"teacher": "emoji", "method": "diff_instruct", "options": {"guidance": 2.5}, "evaluate": "small.yaml",
              "student": {"output": "teacher"}, "data": {"prompts": "prompts.txt"},
              "train": {"updates": 100000, "batch": 2, "preview_every": 0}}  # fmt: skip
    (tmp_path / "prompts.txt").write_text("red heart\na fish\nthumbs up\na cat\n")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bad").touch()
    asked = ["compare", "--methods", "bad.yaml,good.yaml", "--budget", "0.2s", "--output", "out"]
    lines = command(capsys, monkeypatch, *asked)
    row = lines[1].split()
    assert row[:3] == ["good", "diff_instruct", "1"] and row[-5:-2] == [row[-5], "of", "100000"]
    assert "bad: failed: output folder out/bad cannot be written" in lines[2]
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert "cannot be written" in numbers["failed"]["bad"]
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.width >= 12 * 64  # the teacher at 25 and 1 steps and the student, 12 prompts
    report = json.loads((tmp_path / "out" / "good" / "report.json").read_text())
    assert 1 <= report["updates"] < 100000 and report["train_seconds"] >= 0.2
    assert report["wall_seconds"] > report["train_seconds"] + 0.5  # drawing and measuring count
    assert report["recall_of_teachers"]["1"] == pytest.approx(
        report["student"]["recall"]["1"] / report["teacher"]["recall"]["8"]
    )
    assert (tmp_path / "out" / "compare.html").read_text().count("data:image/png;base64,") == 1

    stamp = (tmp_path / "out" / "good" / "report.json").stat().st_mtime_ns
    entries = side_by_side.plan("good.yaml", "emoji", 0.2)
    reports, failed = side_by_side.train_all(entries, tmp_path / "out", lambda *_: None)
    assert list(reports) == ["good"] and failed == {}
    assert (tmp_path / "out" / "good" / "report.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"a finished run of another recipe \(train.lr differ"):
        other = side_by_side.plan("good.yaml", "emoji", 0.2, ["train.lr=0.5"])
        side_by_side.train_all(other, tmp_path / "out", lambda *_: None)


def test_a_budget_is_not_part_of_what_a_run_is() -> None:
    """A run may be resumed under another budget: what it learns by each step is the same."""
    from stepdistill.training.identity import identity

    plain, short = (load_recipe("lcm_emoji", sets=sets) for sets in ((), ("train.budget_seconds=5",)))
    assert plain != short and identity(plain) == identity(short)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "a report of schema 2, and this version reads 1"),
        ({"train_seconds": "long"}, "train_seconds: Input should be a valid number"),
        ({"mystery": 1}, "mystery: Extra inputs are not permitted"),
        ({"verification": None}, "verification: Input should be a valid string"),
    ],
)
def test_a_report_that_is_not_of_the_schema_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    run = write_report(tmp_path / "run", {"1": 2.0})
    read = read_report(run)
    assert (
        isinstance(read, RunReport) and read.version == 1
    )  # written before the schema was: read as its first
    assert RunReport.model_validate_json(read.text()) == read
    write_report(tmp_path / "other", {"1": 2.0}, **change)
    with pytest.raises(UserError, match=re.escape(said)):
        read_report(tmp_path / "other")
