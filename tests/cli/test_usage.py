"""Help with examples, and one line for a wrong verb, option or argument."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

from stepdistill.cli import VERBS, app, main
from stepdistill.cli.options import sides_of
from stepdistill.cli.train import _short_flags, _tell_end
from stepdistill.cli.usage import EXAMPLES
from stepdistill.errors import UserError, did_you_mean
from stepdistill.networks.find import check_teacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.run_folder import RunFolder
from stepdistill.system.shipped import content_folder, recipe_files, suite_files
from stepdistill.training.run_report import Health, RunReport, read_report


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str) -> tuple[int, str]:
    """Exit status of a command line, and all that it prints."""
    monkeypatch.setattr(sys, "argv", ["stepdistill", *shlex.split(line)])
    with pytest.raises(SystemExit) as stopped:
        main()
    answer = capsys.readouterr()
    return int(stopped.value.code or 0), answer.out + answer.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trian", "there is no verb trian (did you mean train?): there are ls, "),
        ("list", "there is no verb list (did you mean ls?)"),
        ("train --stepps 4", "train: there is no option --stepps (did you mean --steps?); "),
        ("train --batch-size 4", "train: there is no option --batch-size: give --set train.batch=VALUE; "),
        ("train --lora-rank 4", "train: there is no option --lora-rank: give --lora VALUE; "),
        ("train --lr 1", "train: there is no option --lr: give --set train.lr=VALUE; "),
        ("train --steps four", "train: invalid value for '--steps': "),
        ("train --method lcm --size 512", "--size is 512: give HEIGHTxWIDTH in pixels, such as 1024x1024"),
        ("doctor --size 32x32", "--size is the teacher's: add --teacher, or leave it out"),
        ("doctor --family ./f.py", "--family is the teacher's: add --teacher, or leave it out"),
        ("sample", "sample: missing argument "),
        ("eval emoji --batch 0", "eval: invalid value for '--batch': "),
        ("sample emoji x --seed 99999999999999999999", "sample: invalid value for '--seed': "),
        (
            "geneval emoji --prompts x --output y --seed 4611686018427387905",
            "geneval: invalid value for '--seed'",
        ),
        ("ls foo", "ls: invalid value for "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    line: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = said(capsys, monkeypatch, line)
    assert status == 2 and text.startswith(f"stepdistill: {expected}") and text.count("\n") == 1


def test_what_transformers_lacks_is_not_told_at_every_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, expected in ((None, "error"), ("info", "info")):
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", given or "")
        if given is None:
            monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
        said(capsys, monkeypatch, "--version")
        assert os.environ["TRANSFORMERS_VERBOSITY"] == expected


def test_bare_train_is_its_help_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = said(capsys, monkeypatch, "train")
    assert status == 2 and text.startswith("Usage: stepdistill train ")
    assert all(f"  stepdistill {line}\n" in text for line in EXAMPLES["train"])
    assert not list(tmp_path.iterdir())


def test_every_verb_has_three_examples_of_options_that_it_has() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert EXAMPLES.keys() == VERBS.keys() == commands.keys()
    for verb, lines in EXAMPLES.items():
        known = {flag for parameter in commands[verb].params for flag in parameter.opts}
        assert len(lines) == 3
        for line in lines:
            words = shlex.split(line)
            assert words[0] == verb and {word for word in words if word.startswith("--")} <= known, line
            assert not {w for w in words if w.endswith("_emoji") and "/" not in w} - recipe_files().keys(), (
                line
            )
            if "--suite" in words:
                suite = words[words.index("--suite") + 1]
                assert suite in suite_files() or suite.endswith(".yaml")
            if verb in ("eval", "geneval") and "--steps" in words:  # a teacher, measured unguided else
                assert "--guidance" in words


@pytest.mark.parametrize(
    ("verb", "default"),
    [("sample", "a teacher's pipeline's"), ("eval", "none of a teacher"), ("geneval", "none of a teacher")],
)
def test_the_help_says_how_a_teacher_is_guided_by_default(verb: str, default: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    (option,) = [parameter for parameter in commands[verb].params if parameter.name == "guidance"]
    assert option.help.endswith(f"[default: a student's own; {default}]")


def test_near_names_are_at_most_five_and_then_a_command() -> None:
    names = [f"run{i}" for i in range(20)]
    assert did_you_mean("run", names, "ls").count("run") == 5
    assert did_you_mean("zzz", names, "ls x") == "(`ls x` lists all)"
    assert did_you_mean("ab", ["ac", "ba"], "ls") == "(there are: ac, ba)"


def test_a_teacher_in_one_file_is_told_how_to_become_a_folder(tmp_path: Path) -> None:
    def of(keys: list[str]) -> str:
        head = json.dumps({key: {} for key in keys}).encode()
        file = tmp_path / "tuned.safetensors"
        file.write_bytes(len(head).to_bytes(8, "little") + head)
        with pytest.raises(UserError) as caught:
            check_teacher(str(file))
        return str(caught.value)

    text = of(["conditioner.embedders.1.model.x", "model.diffusion_model.y"])
    assert "is a single file" in text and "import StableDiffusionXLPipeline as P; P.from_single_file(" in text
    assert text.endswith("then give --teacher tuned")
    assert "import StableDiffusionPipeline as P" in of(["cond_stage_model.transformer.x"])
    assert "is a LoRA alone" in of(["unet.down.lora_A.weight", "lora_unet_x.alpha"])


def test_short_options_are_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = _short_flags(4, 64, "my file.txt", 7.5, 2000, "512x768")
    sets = [f"{key}={value}" for key, (_, value) in short.items()]
    recipe = load_recipe("lcm_emoji", sets=sets)
    assert (recipe.student.steps, recipe.student.lora_rank, recipe.student.times) == (4, 64, None)
    assert (recipe.data.prompts, recipe.data.size) == ("my file.txt", (512, 768))
    assert (recipe.options["guidance"], recipe.train.updates) == (7.5, 2000)


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ("512x768", [512, 768]),
        ("512,768", [512, 768]),
        ("480, 832, 81", [480, 832, 81]),
        ("480x832x81", [480, 832, 81]),
    ],
)
def test_a_size_is_given_with_crosses_or_commas(size: str, sides: list[int]) -> None:
    assert sides_of(size) == sides
    assert _short_flags(None, None, None, None, None, size)["data.size"] == ("--size", json.dumps(sides))


@pytest.mark.parametrize("size", ["", "512", "0x512", "512x", "512x512x3x3", "512;512", "-1x4", "1.5x2"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(UserError, match=f"--size is {re.escape(size)}: give HEIGHTxWIDTH in pixels"):
        sides_of(size)


@pytest.mark.parametrize(
    "option", ["--batch 4", "--workers 0", "--guidance 2", "--trailing", "--diversity 4", "--precision bf16"]
)
def test_a_run_measured_by_its_teacher_takes_no_option_of_suites(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe.yaml", "report.json"):
        (tmp_path / name).write_text("{}")
    status, text = said(capsys, monkeypatch, f"eval {tmp_path} --suite teacher {option}")
    expected = (
        f"stepdistill: {option.split()[0]} is of suites, and {tmp_path} is measured against its teacher's"
    )
    assert status == 2 and text.startswith(expected)


def test_a_run_ends_with_its_table_its_health_and_what_to_do_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = read_report(content_folder("train") / "results" / "lcm_emoji.json")
    assert isinstance(report, RunReport)
    numbers = {"diversity": 0.26, "teacher_diversity": 0.27, "saturation": 0.16, "teacher_saturation": 0.31}
    health = Health(verdict="healthy", sentence="As varied as the teacher's.", **numbers)
    of_classes = {"health": health, "prompts": None}
    _tell_end(report.model_copy(update={"health": health}), RunFolder(Path("runs/my run")))
    assert (
        capsys.readouterr().out.splitlines()[-1] == "next: stepdistill sample 'runs/my run' --prompt \"...\""
    )
    _tell_end(report.model_copy(update=of_classes), RunFolder(Path("runs/my run")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run ") and lines[1].startswith("lcm_emoji ")
    assert lines[-4].startswith("healthy: diversity 0.26 (teacher 0.27)")
    assert lines[-3:-1] == ["student: runs/my run/student", "page: runs/my run/report.html"]
    assert lines[-1] == "next: stepdistill sample 'runs/my run'"
