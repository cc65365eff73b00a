"""The command line as a user meets it: what is refused, what it leaves, and real files for what is made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.cli import main
from stepdistill.cli.doctor import check_requirement
from stepdistill.errors import UserError
from stepdistill.pages.sheets import grid
from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.sections import DataOptions
from stepdistill.system import shipped as content
from stepdistill.system.emoji import embedded_teachers
from stepdistill.system.log import RunLog, read_stats
from stepdistill.system.run_folder import RunStatus
from stepdistill.training import preflight as checks
from stepdistill.training.interruption import Preempted

VERBS = [
    "ls",
    "cp",
    "train",
    "sample",
    "eval",
    "geneval",
    "stats",
    "compare",
    "export",
    "verify",
    "push",
    "demo",
    "doctor",
]


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as ``stepdistill`` would run."""
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from stepdistill.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def output_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command prints, run in this process."""
    monkeypatch.setattr(sys, "argv", ["stepdistill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    return capsys.readouterr().out


def test_help_names_every_verb_and_imports_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    answer = cli("--help", cwd=tmp_path)
    assert answer.returncode == 0
    for verb in VERBS:
        assert f"\n  {verb} " in answer.stdout
    code = "import sys; import stepdistill.cli; print(*(m in sys.modules for m in ('torch', 'pydantic', 'yaml')))"
    root = Path(__file__).resolve().parents[2]
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == ["False", "False", "False"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--method", "dmdd"],
            "--method: dmdd is not a method (did you mean dmd? `stepdistill ls methods` lists all)",
        ),
        (["--method", "dmd", "--teacher", "folder/gone"], "teacher folder/gone does not exist (there are: "),
        (["--method", "dmd", "--teacher", "folder"], "teacher folder is not a diffusers pipeline: "),
        (["--method", "dmd", "--set", "data.prompts=empty.txt"], "data.prompts: empty.txt holds no prompt; "),
        (
            ["--method", "dmd", "--set", "data.images=gone", "--set", "options.adversarial_weight=1"],
            "data.images: gone is not a folder; ",
        ),
        (["--method", "dmd", "--output", "empty.txt/run"], "output folder empty.txt/run cannot be written: "),
        (["--method", "dmd", "--resume"], "--resume: there is no run {here}/runs/dmd_emoji to go on with; "),
        (
            ["--output", "run", "--resume", "--set", "data.prompts=gone.txt"],
            "--resume: {here}/run holds no run (it has no recipe.yaml); ",
        ),
        (
            ["--method", "dmd", "--set", "train.step=3"],
            "--set: train.step is not a key of train (did you mean updates? ",
        ),
        (
            ["--method", "dmd", "--set", "options.guidanc=3"],
            "--set: options.guidanc is not an option of dmd (did you mean guidance, ",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    arguments: list[str],
    expected: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("\n  \n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stepdistill", "train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    answer = capfd.readouterr()
    assert stopped.value.code == 2
    assert answer.err.startswith(f"stepdistill: {expected.replace('{here}', str(tmp_path))}")
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty.txt",
        "folder",
    ]  # nothing was left behind


@pytest.mark.parametrize(
    "raised, status, said",
    (
        (Preempted(), 75, ""),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(28, "No space left on device"),
            2,
            "stepdistill: No space left on device: the disk could not be",
        ),
    ),
)
def test_how_a_run_ended_is_its_exit_status(
    raised: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """75 is sysexits.h's "try again", by which a job is queued again."""

    def run(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("stepdistill.training.distil.run_recipe", run)
    monkeypatch.setattr(
        sys, "argv", ["stepdistill", "train", "dmd_emoji_quick", "--output", str(tmp_path / "a")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == status
    told = capfd.readouterr().err.strip()
    assert told.startswith(said) and told.count("\n") == 0 and bool(told) == bool(said)


def test_ls_lists_what_is_shipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {line.split()[0] for line in output_of(capsys, monkeypatch, "ls").splitlines() if line[0] == " "}
    shipped = {*embedded_teachers(), *content.recipe_files(), *content.suite_files()}
    assert shipped | {"dmd", "lcm", "reflow", "stable_diffusion"} <= names
    laptop, real = output_of(capsys, monkeypatch, "ls", "recipes").split("recipes for real teachers:")
    assert (
        "(train.weights=bf16: 31 GB), the teacher 5 GB, and activations. | Not" in real
    )  # sentences are whole
    assert "  dmd_emoji " in laptop and "  dmd2_sdxl_4step " in real and "_emoji" not in real
    teachers = output_of(capsys, monkeypatch, "ls", "teachers").split()
    assert teachers[:2] == ["emoji", "StableDiffusionPipeline"]


def test_cp_copies_a_recipe_byte_for_byte_and_keeps_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file in list(content.recipe_files().items())[:1]:
        output_of(capsys, monkeypatch, "cp", name, str(tmp_path))
        assert (tmp_path / f"{name}.yaml").read_bytes() == file.read_bytes()
        refused = cli("cp", name, str(tmp_path), cwd=tmp_path)
        assert (refused.returncode, "exists already" in refused.stderr) == (2, True)
    assert cli("cp", "gone", "x.yaml", cwd=tmp_path).returncode == 2
    output_of(capsys, monkeypatch, "cp", "own_method", str(tmp_path / "my.py"))
    assert (tmp_path / "my.py").read_bytes() == content.template_files()["own_method"].read_bytes()


def test_cp_makes_a_folder_whose_name_ends_with_a_slash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        output_of(capsys, monkeypatch, "cp", "dmd_emoji", "mine/recipes/") == "mine/recipes/dmd_emoji.yaml\n"
    )
    assert Path("mine/recipes/dmd_emoji.yaml").is_file()
    assert output_of(capsys, monkeypatch, "cp", "dmd_emoji", "named") == "named\n" and Path("named").is_file()
    for place, reason in (
        ("named/", "named/ is a file: give a folder"),
        ("named/in/", "cannot be written: "),
    ):
        monkeypatch.setattr(sys, "argv", ["stepdistill", "cp", "dmd_emoji", place])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and reason in said and said.count("\n") == 1


def test_run_folders_are_numbered_and_found_again(tmp_path: Path) -> None:
    for number in ("", "-2", "-10"):
        (tmp_path / f"dmd_emoji{number}").mkdir()
        (tmp_path / f"dmd_emoji{number}" / "recipe.yaml").write_text("")
    (tmp_path / "dmd_emoji-more").mkdir()
    assert checks.next_run_folder(tmp_path, "dmd_emoji") == tmp_path / "dmd_emoji-3"
    assert checks.newest_run_folder(tmp_path, "dmd_emoji") == tmp_path / "dmd_emoji-10"
    assert checks.next_run_folder(tmp_path, "lcm_emoji") == tmp_path / "lcm_emoji"


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    # One that ended before its first checkpoint was whole left nothing to keep.
    (tmp_path / "work" / "checkpoints" / ".step-00000005.part").mkdir(parents=True)
    checks.check_output(tmp_path, resume=False)
    (tmp_path / "work" / "checkpoints" / "step-00000005").mkdir()
    with pytest.raises(UserError, match="holds a run already: add --resume"):
        checks.check_output(tmp_path, resume=False)
    checks.check_output(tmp_path, resume=True)
    with pytest.raises(UserError, match="holds no run"):
        checks.check_output(tmp_path / "new", resume=True)
    status = RunStatus(tmp_path, 1)
    status.now = replace(status.now, pid=os.getppid())
    status.tell("training", "training")
    with pytest.raises(UserError, match=rf"a run that is under way \(process {os.getppid()}, training\)"):
        checks.check_output(tmp_path, resume=True)
    status.tell("stopped", "it was asked to stop")
    checks.check_output(tmp_path, resume=True)
    checks.check_output(tmp_path / "new" / "deep", resume=False)
    assert not (tmp_path / "new").exists()


def test_resuming_elsewhere_names_the_folder_that_the_paths_of_the_run_start_at(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    (run / "work" / "checkpoints" / "step-00000005").mkdir(parents=True)
    (run / "work" / "checkpoints" / "step-00000005" / "state.json").write_text('{"folder": "/first"}')
    recipe = Recipe(teacher="emoji", method="dmd", data=DataOptions(prompts="gone.txt"))
    with pytest.raises(
        UserError, match=r"gone.txt not found: .*; relative paths of the run .*/run start at /first, "
    ):
        checks.check_recipe(recipe, run)
    for resumed in (None, tmp_path / "other"):
        with pytest.raises(UserError, match=r"captions$"):
            checks.check_recipe(recipe, resumed)


def test_a_hub_name_passes_only_online_and_a_mistyped_path_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        checks.check_recipe(Recipe(teacher="nobody/has-this", method="dmd"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    checks.check_recipe(Recipe(teacher="nobody/has-this", method="dmd"))
    for typo in ("runs/typo", "./a/b", "../a"):
        with pytest.raises(UserError, match="does not exist"):
            checks.check_recipe(Recipe(teacher=typo, method="dmd"))


def test_stats_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, spans in ((whole, [(0, 6)]), (broken, [(0, 5), (3, 6)])):
        folder.mkdir()
        for first, last in spans:
            with RunLog(folder, 6, first=first) as log:
                for step in range(first, last):
                    log.update(step, {"network": "student", "loss": 1 / (step + 1)})
        if folder == broken:
            assert read_stats(folder)[2]["loss"] == 1 / 3
    assert (whole / "stats.jsonl").read_bytes() == (broken / "stats.jsonl").read_bytes()
    assert [line["update"] for line in read_stats(whole)] == list(range(6))
    with (whole / "stats.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    assert len(read_stats(whole)) == 6


def test_grid_places_images_row_by_row_and_enlarges_by_whole_factors() -> None:
    colours = [(10 * i, 0, 0) for i in range(5)]
    sheet = grid([Image.new("RGB", (4, 4), colour) for colour in colours], tile=9, gap=1)
    assert sheet.size == (3 * 9 + 1, 2 * 9 + 1)  # 3 columns, 2 rows, tiles of 8
    for i, colour in enumerate(colours):
        row, column = divmod(i, 3)
        for x, y in ((1, 1), (8, 8)):
            assert sheet.getpixel((9 * column + x, 9 * row + y)) == colour
    assert sheet.getpixel((9 * 2 + 4, 9 + 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("installed", "state"), [("2.10.1", "ok"), ("2.11.0+cpu", "ok"), ("2.9.1", "broken"), (None, "broken")]
)
def test_doctor_compares_versions_with_the_supported_range(installed: str | None, state: str) -> None:
    from packaging.requirements import Requirement

    finding = check_requirement(Requirement("torch>=2.10"), installed)
    assert finding.state == state
    assert ("pip install 'torch>=2.10'" in finding.text) == (state == "broken")


@pytest.mark.slow
def test_ls_methods_says_of_each_what_it_is_for_and_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = output_of(capsys, monkeypatch, "ls", "methods")
    assert text.splitlines()[0].split() == ["method", "steps", "needs", "LoRA", "networks", "passes"]
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert content.module_summaries("methods").keys() <= rows.keys()
    for name, cells in {
        "lcm": "4, any pairs (+ images) yes 3 4.0 one guided solver step apart,",
        "dmd": "1 follower (+ images, pairs, states, reward) yes 3 2.3 match",
        "asd": "1, 2, 4 follower (+ images, pairs, states) yes 3",
        "slimflow": "1 pairs no 3 1.0 a smaller",
        "meanflow": "1 pairs, second time (+ images, states) merged 2 4.0 the mean velocity",
    }.items():
        assert " ".join(rows[name].split()).startswith(f"{name} {cells}"), rows[name]
    assert text.index("consistency:") < text.index("\ntscd") < text.index("distribution matching:")
