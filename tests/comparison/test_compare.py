"""Runs side by side: what is ranked, what is refused, the page, the plan, and real runs that fail, stop and go on."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.cli import main
from stepdistill.comparison import plan as planning
from stepdistill.comparison import ranking as compare
from stepdistill.comparison import shared
from stepdistill.comparison import train_all as training
from stepdistill.comparison.collect import collect, short_names
from stepdistill.comparison.page import Comparison, as_json, html_page
from stepdistill.comparison.pictures import common_sheet
from stepdistill.comparison.table import text_tables
from stepdistill.comparison.train_all import train_all
from stepdistill.errors import UserError
from stepdistill.pages.sheets import png_of_rows, read_sheet
from stepdistill.recipes import choose
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.run_folder import RunFolder
from stepdistill.system.shipped import recipe_files
from stepdistill.training.run_report import RunReport, read_report

TRAIN = Path(__file__).resolve().parents[2] / "train"
RESULTS = TRAIN.parent / "docs" / "evidence" / "results.md"


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
        ["b", "dmd", "1", "1-2", "0.750", "2.000", *same],
        ["a", "dmd", "1", "1-2", "0.500", "3.000", *same],
        ["a", "dmd", "4", "-", "0.875", "1.500", *same],
    ]
    assert "density" not in lines[0]  # measured by none
    text = (tmp_path / "out" / "compare.html").read_text()
    assert text.count("data:image/png;base64,") == 1 and text.count("<svg role=img") == 2
    assert "stepdistill train &lt;b&gt;" in text
    assert "http" not in text
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["name"] for run in numbers["runs"]] == ["a", "b"]
    assert numbers["runs"][0]["scores"]["4"]["fd"] == 1.5 and numbers["runs"][0]["updates"] == 90
    (teacher,) = numbers["groups"][0]["teachers"]
    assert teacher["name"] is None and teacher["scores"]["fd"] == {"1": 5.0, "25": 1.0}


def test_more_runs_than_colours_have_a_line_each(tmp_path: Path) -> None:
    reports = [write_report(tmp_path / f"run{i:02}", {"1": 2.0 + i, "4": 1.5}) for i in range(11)]
    few, many = (html_page(collect(some, "command")) for some in (reports[:10], reports))
    assert "FD-emoji against training time" in few and "FD-emoji against training time" not in many
    labels = re.findall(r'<svg role=img aria-label="([^"]*)"', many)
    assert [label.partition(".")[0] for label in labels] == [
        "FD-emoji at each run&#x27;s best step count",
        "Training time",
    ]
    assert labels[0].count("4 steps: 1.5;") == 11 and labels[0].endswith("the teacher in 25 steps: 1.")
    assert labels[1].count("4 steps: 61") == 11


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"suite": "emoji@2"}, "suite differs: emoji@1 .a., emoji@2 .b."),
        ({"n": 200}, "n differs: 2000 .a., 200 .b."),
        ({"protocol": {"features_sha256": "y"}}, "protocol.features_sha256 differs: x .a., y .b."),
    ],
)
def test_different_protocols_stand_side_by_side_and_are_not_ranked_together(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    first = write_report(tmp_path / "a", {"1": 3.0}, protocol={"features_sha256": "x"})
    other = write_report(tmp_path / "b", {"1": 2.0}, **change)
    more = write_report(tmp_path / "c", {"1": 2.5}, protocol={"features_sha256": "x"})
    compared = collect([first, other, more], "command")
    with pytest.raises(UserError, match=field):
        compare.rank(compared.reports)
    assert [[row.name for row in group.rows] for group in compared.groups] == [["c", "a"], ["b"]]
    assert [bool(group.apart) for group in compared.groups] == [False, True]
    for text in (text_tables(compared.groups), html_page(compared)):
        assert re.search(f"Not compared with 1, because {field}", text)
        assert "2. " in text and text.index("c ") < text.index("Not compared")
    assert as_json(compared)["groups"][1]["runs"] == ["b"]


def test_runs_without_scores_show_their_training_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare: dict[str, object] = {"suite": None, "n": 0, "student": {"fd": {}, "clip_score": {}}, "teacher": {}}
    bare |= {"gap_closed": {}, "recall_of_teachers": {}, "metrics": {}}
    runs = [write_report(tmp_path / name, {}, **bare) for name in ("x", "y")]
    picture = tmp_path / "x" / "pictures" / "samples.png"
    picture.parent.mkdir()
    Image.new("RGB", (2, 2)).save(picture)
    monkeypatch.chdir(tmp_path)
    lines = command(capsys, monkeypatch, "compare", *runs)
    assert [line.split()[:4] for line in lines[:3]] == [
        ["run", "method", "training", "updates"],
        ["x", "dmd", "61", "s"],
        ["y", "dmd", "61", "s"],
    ]
    assert lines[-1] == "page: runs/compared/compare.html"
    page = (tmp_path / "runs" / "compared" / "compare.html").read_text()
    assert "Not measured" in page and page.count("data:image/png;base64,") == 1
    measured = write_report(tmp_path / "z", {"1": 2.0})
    found = collect([*runs, measured], "c").groups
    assert [group.title for group in found] == ["suite emoji@1, 2,000 images", "not measured"]
    assert "set evaluate in the recipe" in found[1].apart[0]


def test_runs_that_have_not_ended_are_left_out_and_what_is_given_twice_counts_once(tmp_path: Path) -> None:
    run = write_report(tmp_path / "a", {"1": 3.0})
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "recipe.yaml").write_text("method: dmd")
    (tmp_path / "latest").symlink_to("a")
    compared = collect([run, str(tmp_path / "latest"), str(tmp_path / "going")], "c")
    assert [report.name for report in compared.reports] == ["a"] and "has not ended" in compared.failed[
        "going"
    ]
    with pytest.raises(UserError, match="compare runs that have ended"):
        collect([str(tmp_path / "going")], "c")
    with pytest.raises(UserError, match=r"absent: there is no report.json"):
        collect([run, str(tmp_path / "absent")], "c")


def test_names_are_as_short_as_tells_them_apart() -> None:
    places = [Path(f"/data/long/way/{end}") for end in ("x/run", "y/run", "other", "x/run/eval.json")]
    assert short_names(["run", "run", "other", "eval"], places) == ["x/run", "y/run", "other", "eval"]
    assert short_names(["run"] * 2, [Path("/a/b/run"), Path("/c/b/run")]) == ["a/b/run", "c/b/run"]


def test_pictures_of_runs_are_put_together_where_their_prompts_are_the_same(tmp_path: Path) -> None:
    """The teacher's rows once, most steps first, each student's under its run's name; of another prompt no common
    sheet."""

    def run(name: str, prompts: list[str], steps: int, value: int) -> tuple[str, Path]:
        rows = [
            (f"teacher, {n} steps", torch.full((2, 3, 32, 32), n, dtype=torch.uint8)) for n in (25, steps)
        ]
        rows.append((f"student, {steps} steps", torch.full((2, 3, 32, 32), value, dtype=torch.uint8)))
        file = RunFolder(tmp_path / name).samples
        file.parent.mkdir(parents=True)
        file.write_bytes(png_of_rows(rows, prompts))
        return name, tmp_path / name

    a, b = run("a", ["cat", "dog"], 8, 100), run("b", ["cat", "dog"], 4, 200)
    png = common_sheet([a, b])
    sheet = read_sheet(png) if png else None
    assert sheet is not None and sheet.prompts == ("cat", "dog")
    labels = ["teacher, 25 steps", "teacher, 8 steps", "teacher, 4 steps", "a, 8 steps", "b, 4 steps"]
    assert [row.label for row in sheet.rows] == labels
    assert [row.pictures[1].getpixel((5, 5))[0] for row in sheet.rows] == [25, 8, 4, 100, 200]
    assert common_sheet([a, run("c", ["cat", "fish"], 4, 1)]) is None
    assert common_sheet([a, ("none", tmp_path / "none")]) is None


def test_your_own_metrics_have_a_column_each_with_their_direction(tmp_path: Path) -> None:
    student = {"fd": {"1": 2.0}, "sharpness": {"1": 0.25}, "sharpness_se": {"1": 0.031}}
    write_report(tmp_path / "a", {"1": 2.0}, student=student, better={"sharpness": "higher"})
    write_report(tmp_path / "b", {"1": 3.0})
    compared = collect([str(tmp_path / "a"), str(tmp_path / "b")], "c")
    head, *lines = text_tables(compared.groups).splitlines()
    assert head.split()[-1] == "sharpness" and lines[0].endswith("0.250 ± 0.031") and lines[1].endswith(" -")
    assert "sharpness: higher is better" in html_page(compared)
    assert as_json(compared)["runs"][0]["scores"]["1"]["sharpness_se"] == 0.031


def test_network_passes_are_told_in_millions_and_those_of_a_try_one_by_one(tmp_path: Path) -> None:
    write_report(
        tmp_path / "a", {"1": 2.0}, passes={"student": {"with_graph": 200_000, "without_graph": 50_000}}
    )
    write_report(tmp_path / "b", {"1": 3.0}, passes={"teacher": {"with_graph": 0, "without_graph": 1_440}})
    write_report(tmp_path / "c", {"1": 4.0})
    head, *lines = text_tables(collect([str(tmp_path / name) for name in "abc"], "c").groups).splitlines()
    start = head.index("  passes") + 1
    assert [line[start : start + 9].split() for line in lines[:3]] == [["0.25", "M"], ["1440"], ["-"]]


def test_training_seeds_become_a_mean_with_both_errors(tmp_path: Path) -> None:
    """Distances 2, 3 and 4: mean 3, deviation 1; the evaluation's errors 0.3 and twice 0.6 have the root mean square
    0.5196, and the error of the mean is the root of 0.27 + 1 / 3."""
    runs = {
        f"m-seed{seed}": {"fd": {"1": fd}, "fd_se": {"1": error}, "kid": {"1": None}}
        for seed, (fd, error) in enumerate(((2.0, 0.3), (3.0, 0.6), (4.0, 0.6)))
    }
    for name, student in runs.items():
        write_report(
            tmp_path / name,
            {"1": student["fd"]["1"]},
            student=student,
            train_seconds=60.0 + student["fd"]["1"],
        )
    reports = [read_report(tmp_path / name) for name in runs]
    (group,) = compare.groups(reports, dict.fromkeys(runs, "m"))
    (row,) = group.rows
    assert (row.name, row.seeds, row.fd, row.deviation["fd"], row.kid) == ("m", 3, 3.0, 1.0, None)
    assert row.fd_se == pytest.approx((0.27) ** 0.5) and row.error_of("fd") == pytest.approx(
        (0.27 + 1 / 3) ** 0.5
    )
    assert (row.gap_closed, row.train_seconds) == (0.5, 63.0)
    text = text_tables([group])
    assert text.split()[3] == "trainings" and text.splitlines()[1].split()[:4] == ["m", "dmd", "1", "3"]
    assert "3.0 ± 1.0 (± 0.52)" in text and "0.50 ± 0.25" in text
    compared = Comparison(reports, [None] * 3, repeats=dict.fromkeys(runs, "m"))
    page, numbers = html_page(compared), as_json(compared)
    assert "3.0 ± 1.0 (± 0.52)" in page and "standard deviation between training seeds" in page
    assert [run["name"] for run in numbers["runs"]] == list(runs)
    (over,) = numbers["groups"][0]["over_seeds"]
    assert over["fd"] == 3.0 and over["deviation"]["fd"] == 1.0
    one = compare.groups(reports[:1], dict.fromkeys(runs, "m"))[0].rows[0]
    assert (one.seeds, one.deviation, one.error_of("fd")) == (1, {}, 0.3)


@pytest.fixture(scope="module")
def results() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("results", TRAIN / "results.py")
    assert spec is not None and spec.loader is not None
    found = sys.modules["results"] = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_results_have_a_table_for_each_teacher(results: ModuleType, tmp_path: Path) -> None:
    """Each under its own teacher's scores; the shipped reports give the shipped page and recipes to the last byte."""
    for folder in ("results", "recipes"):
        shutil.copytree(TRAIN / folder, tmp_path / folder)
    page, recipes = tmp_path / "results.md", sorted((tmp_path / "recipes").glob("*.yaml"))
    before = RESULTS.read_text()
    page.write_text(before)
    for file in recipes:  # a header that was not written by results.py does not stay
        file.write_text(file.read_text().replace("# Gave: ", "# Gave: much, "))
    results.put([], tmp_path, page)
    assert page.read_text() == before
    assert [file.read_text() for file in recipes] == [
        (TRAIN / "recipes" / f.name).read_text() for f in recipes
    ]

    more = {
        "name": "mine",
        "teacher_name": "other-teacher",
        "guidance": 4.0,
        "wall_seconds": 90.0,
        "commit": "0123456789",
    }
    more |= {"hardware": "a machine", "teacher": {"fd": {"1": 7.5, "25": 2.25}, "clip_score": {"25": 0.5}}}
    run = write_report(tmp_path / "run", {"2": 3.0, "4": 2.5}, **more)
    (tmp_path / "run" / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "run" / "pictures" / "samples.png")
    results.put([run], tmp_path, page)
    assert page.read_text().startswith(before.split(results.END)[0].rstrip())
    added = page.read_text().split("## Teacher ")[-1]
    assert added.startswith(
        "other-teacher\n\nSuite emoji@1, 2,000 images, guidance 4. The teacher: FD-emoji 7.50 at 1 step (at its "
        "better guidance) and 2.25 at 25, CLIP-emoji 0.500 at 25. Hardware: a machine.\n\n| | command |"
    )
    ranked, folded, commands = added.split("<details")
    assert "| mine | `stepdistill train <b>` |" in commands
    assert (
        "| 1 | `stepdistill train mine` | 4 | 0.625 | 2.50 | - |  | 0.800 (160.0%) | 0.800 (95.0%) | 1.0 | 1.5 |"
        in ranked
    )
    assert "| `stepdistill train mine` | 2 | 0.500 | 3.00 |" in folded and "_emoji" not in added


def test_results_are_of_shipped_recipes_ranked_and_no_run_is_shorter_than_its_training(
    results: ModuleType, tmp_path: Path
) -> None:
    reports = [results.report_of(file) for file in sorted((TRAIN / "results").glob("*.json"))]
    headings = {
        line.removeprefix("## ")
        for line in (TRAIN.parent / "LOG.md").read_text().splitlines()
        if line.startswith("## ")
    }
    assert set(results.TRIED.values()) <= headings
    assert results.anchor("2026-11-22: TSCD, f-distill, rf++") == "2026-11-22-tscd-f-distill-rf"
    results.plot(reports, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as drawn, Image.open(TRAIN / "results" / results.PLOT) as shipped:
        assert drawn.size == shipped.size
    for report in reports:
        assert report.name in recipe_files() and results.tried(report)
        if report.warm_start_of:
            assert results.whole_run(report) == f"warm start of {Path(report.warm_start_of).name}"
        elif report.resumes:
            assert results.whole_run(report) == results.IN_PARTS
        else:
            assert float(results.whole_run(report)) * 60 >= report.train_seconds - 3
    first, others = results.best_of_each_method(
        [report for report in reports if report.teacher_name == "emoji"]
    )
    assert [row.gap for row in first] == sorted((row.gap for row in first), reverse=True)
    assert len({row.report.method for row in first}) == len(first)
    for row in others:
        best = any(b.report.method == row.report.method and b.gap >= row.gap for b in first)
        assert (
            best or "fd" in row.report.conflicts
        )  # whose own loss looked through the network of FD is not ranked
    for name, file in recipe_files().items():
        known = {report.name for report in reports}
        assert ("\n# Gave: gap closed " if name in known else "\n# Not measured.") in file.read_text()


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
    compared = collect([str(tmp_path / place / "run") for place in ("x", "y")], "c")
    assert len({row.name for row in compare.rank(compared.reports)}) == 2
    assert [len(run["scores"]) for run in as_json(compared)["runs"]] == [1, 1]


def test_a_page_without_a_finished_run_says_what_failed() -> None:
    page = html_page(Comparison([], [], {"sim": "a loss of <NaN>"}, ["scm"]))
    assert "sim: a loss of &lt;NaN&gt;" in page and "No recipe for: scm" in page


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", None), ("m", None), ("0s", None)]
)
def test_budgets(text: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(
            UserError, match=r"give a number with its unit, s, m or h, such as 90s, 10m or 1\.5h"
        ):
            planning.seconds_of(text)
    else:
        assert planning.seconds_of(text) == seconds


def test_all_plans_one_recipe_a_method_and_names_the_methods_without() -> None:
    wanted = planning.plan("all", "emoji", 600, ["train.batch=8"])
    from stepdistill.system.shipped import method_names

    methods = [entry.recipe.method for entry in wanted.entries]
    assert len(set(methods)) == len(methods)
    said = [line for line in wanted.remarks if line.startswith("left out: ")]
    # No prompts of colours, no images of a concept or a domain, and no student of few steps are there.
    left = ["crd", "echo", "gndmr", "self_opd", "uni_dad"]
    assert [line.split(": ")[1] for line in said] == [f"{name}_emoji" for name in left]
    assert {*methods, *wanted.without_recipe, *left} == set(method_names())
    with pytest.raises(UserError, match=r"uni_dad_emoji: data\.images: runs/night is not a folder"):
        planning.plan("lcm,uni_dad", "emoji")
    with pytest.raises(UserError, match=r"train\.bach"):
        planning.plan("all", "emoji", 600, ["train.bach=8"])
    assert {"dmd", "lcm", "reflow"} <= set(methods)
    assert all((e.recipe.train.budget_seconds, e.recipe.train.batch) == (600, 8) for e in wanted.entries)


def test_a_budget_chooses_the_recipe_that_fits_and_without_one_the_methods_own_is_taken() -> None:
    """Of DMD's recipes two trained in thirteen minutes when the shipped results were made, and the quick one in
    five."""
    assert planning.recipe_of("dmd", "emoji") == "dmd_emoji"
    assert planning.recipe_of("dmd", "emoji", 780) == "dmd_emoji_below_noise"
    assert planning.recipe_of("dmd", "emoji", 300) == "dmd_emoji_quick"
    assert planning.recipe_of("dmd", "emoji", 1) == "dmd_emoji_quick"
    assert planning.recipe_of("dmd", "some/teacher") == "dmd_emoji"
    assert planning.recipe_of("no_such_method", "emoji") is None


def test_what_cannot_be_planned_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dmdd is neither a method nor a recipe .did you mean dmd"):
        planning.plan("dmdd", "emoji")
    only = {"lcm_emoji": recipe_files()["lcm_emoji"]}
    monkeypatch.setattr(choose, "recipe_files", lambda: only)
    with pytest.raises(UserError, match=r"no recipe is shipped for sim, scm: .* there are recipes for lcm$"):
        planning.plan("sim,lcm,scm", "emoji")
    mine = tmp_path / "lcm_emoji.yaml"
    mine.write_bytes(only["lcm_emoji"].read_bytes())
    with pytest.raises(UserError, match="two recipes are called lcm_emoji"):
        planning.plan(f"lcm,{mine}", "emoji")


def test_seeds_and_shared_pairs_are_planned() -> None:
    wanted = planning.plan("lcm_lora_emoji,reflow,dmd", "emoji", sets=["options.guidance=2.5"], seeds=[0, 7])
    assert [entry.name for entry in wanted.entries[:2]] == ["lcm_lora_emoji-seed0", "lcm_lora_emoji-seed7"]
    assert [entry.recipe.train.seed for entry in wanted.entries] == [0, 7] * 3
    assert wanted.repeats["reflow_emoji-seed7"] == "reflow_emoji"
    entries = shared.with_shared(wanted.entries, Path("out"))
    for entry in entries:  # what the run is given is what was planned
        sets = [b for a, b in pairwise(entry.arguments) if a == "--set"]
        assert load_recipe(entry.source, teacher="emoji", sets=sets) == entry.recipe
    same = ["options.pairs=64", "options.pair_steps=5", "options.guidance=2"]
    a, b, c, other = (
        shared.pool_of(load_recipe(name, sets=[*same, *sets]))
        for name, sets in (
            ("lcm_emoji", []),
            ("instaflow_emoji", ["train.batch=3"]),
            ("lcm_emoji", ["train.seed=7"]),
            ("lcm_emoji", ["options.pairs=65"]),
        )
    )
    assert a == b and len({a, c, other}) == 3 and a is not None
    assert shared.pool_of(load_recipe("tbcm_emoji")) is None  # it draws none
    steps = [
        shared.pool_of(load_recipe("sid_emoji", sets=[f"student.times={t}"])) for t in ("[1.0]", "[1.0, 0.5]")
    ]
    assert len(set(steps)) == 2  # the states that are kept with the pairs
    assert shared.pool_of(load_recipe("lcm_emoji", sets=["data.pairs=mine"])) is None
    with pytest.raises(UserError, match=r"--seeds sets train\.seed"):
        planning.plan("lcm", "emoji", sets=["train.seed=3"], seeds=[0])
    with pytest.raises(UserError, match="give different whole numbers"):
        planning.seeds_of("0,1,1")
    assert planning.seeds_of("0, 2") == (0, 2)


def test_one_warm_start_of_several_methods_is_told_and_dry_runs_say_what_each_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = planning.plan("sid,tbcm,vdot", "emoji")
    entries = shared.with_shared(wanted.entries, tmp_path)
    kept = [entry.recipe.train.warm_starts for entry in entries]
    assert kept == [str(tmp_path / "warm_starts"), None, str(tmp_path / "warm_starts")]
    lines = shared.told(wanted.entries)
    assert lines[:2] == [
        "The same pairs, made once: sid_emoji, vdot_emoji.",
        "The same warm start, made once: sid_emoji, vdot_emoji.",
    ]
    assert not shared.told(planning.plan("tbcm,vdot", "emoji").entries)
    page = html_page(Comparison([], [], shared=lines))
    assert "The same warm start, made once" in page
    (tmp_path / "vdot_emoji").mkdir()
    (tmp_path / "vdot_emoji" / "report.json").write_text("{}")
    said = command(
        capsys, monkeypatch, "compare", "--methods", "sid,tbcm,vdot", "--dry-run", "--output", str(tmp_path)
    )
    assert [line.split()[:3] for line in said[:4]] == [
        ["run", "needs", "updates"], ["sid_emoji", "pairs", "3,260"], ["tbcm_emoji", "prompts", "320"],
        ["vdot_emoji", "pairs", "3,260"],
    ]  # fmt: skip
    assert (
        said[3].endswith("all of it") and said[2].endswith("-") and said[-1] == "dry run: nothing was written"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["vdot_emoji"]
    assert said[1].split()[5] == "0.20"  # 8192 pairs of 12 guided steps, in millions of passes


def test_what_would_fail_is_said_before_the_first_run(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "mine")
    mine, prompts = str(tmp_path / "mine"), tmp_path / "p.txt"
    prompts.write_text("a cat")
    given = [f"data.prompts={prompts}"]
    wanted = planning.plan("lcm,tcd", mine, sets=given)
    assert wanted.remarks[0].startswith(
        f"{mine} has no recipes of its own: lcm takes lcm_emoji, tcd takes tcd_emoji."
    )
    assert planning.plan("lcm", "emoji").remarks == ("lcm takes lcm_emoji",)
    for said, methods, sets in (
        ("lcm_emoji: .*draws from prompts: add --set data.prompts=FILE", "lcm", []),
        ("tcd_emoji: evaluate: no suite 'emojy' .did you mean emoji", "tcd", [*given, "evaluate=emojy"]),
        ("nothing would be measured: evaluate is false in lcm_emoji", "lcm", [*given, "evaluate=false"]),
        ("lcm_emoji: .*skipp", "lcm", [*given, "options.skipp=3"]),
    ):
        with pytest.raises(UserError, match=said):
            planning.plan(methods, mine, sets=sets)


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
    assert any("bad: failed: output folder out/bad cannot be written" in line for line in lines[2:])
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
    assert (tmp_path / "out" / "compare.html").read_text().count("data:image/png;base64,") == 3  # rows

    stamp = (tmp_path / "out" / "good" / "report.json").stat().st_mtime_ns
    entries = planning.plan("good.yaml", "emoji", 0.2)
    reports, failed = train_all(entries, tmp_path / "out", lambda *_: None)
    assert list(reports) == ["good"] and failed == {}
    assert (tmp_path / "out" / "good" / "report.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"a finished run of another recipe \(train.lr differ"):
        other = planning.plan("good.yaml", "emoji", 0.2, ["train.lr=0.5"])
        train_all(other, tmp_path / "out", lambda *_: None)


def test_a_run_that_a_killed_comparison_has_left_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process goes on by itself, and nobody else may train in its folder before it has ended."""
    looks: list[float] = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as left:
        status = {"state": "training", "phase": "x", "update": 1, "updates": 9, "eta_seconds": None, "health": None,
                  "pid": left.pid, "host": platform.node(), "written": "2999-01-01T00:00:00+00:00"}  # fmt: skip
        (tmp_path / "status.json").write_text(json.dumps(status))

        def look(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 2:
                left.communicate(b"\n")

        monkeypatch.setattr(training.time, "sleep", look)
        training._wait_for(tmp_path, "[1/1] run")
    assert len(looks) == 2
    assert capsys.readouterr().err.count(f"process {left.pid}, which an earlier comparison has left") == 1
    training._wait_for(tmp_path / "none", "[1/1] run")


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
