"""GenEval's folder format, an export that goes on after a stop, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

from stepdistill.cli import main
from stepdistill.errors import UserError
from stepdistill.evaluation.geneval import export_geneval

ROWS = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
    {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "red"}], "prompt": "a red kite"},
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_the_folder_is_as_geneval_reads_it_and_every_picture_has_its_seed(
    pipe: Any, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    drawn = export_geneval(
        pipe, prompts, out, steps=2, samples=2, guidance=2.0, seed=5, batch=4, progress=False
    )
    assert drawn == 6
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert files == sorted(
        ["export.json"]
        + [f"{i:05}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")]
    )  # fmt: skip
    for i, row in enumerate(ROWS):  # as evaluate_images.py of GenEval does
        assert json.loads((out / f"{i:05}" / "metadata.jsonl").read_text()) == row
    generator = torch.Generator().manual_seed(5 + 2 * 1 + 1)
    by_hand = pipe(ROWS[1]["prompt"], num_inference_steps=2, guidance_scale=2.0, generator=generator)
    there = np.asarray(Image.open(out / "00001" / "samples" / "0001.png")).astype(int)
    assert np.abs(there - np.asarray(by_hand.images[0]).astype(int)).max() <= 2


def test_an_export_that_was_stopped_is_finished_and_nothing_is_drawn_twice(
    pipe: Any, prompts: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    export_geneval(pipe, prompts, whole, steps=1, samples=2, batch=1, progress=False)
    passes: list[int] = []

    def stop(module: Any, args: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    hook = pipe.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        export_geneval(pipe, prompts, out, steps=1, samples=2, batch=1, progress=False)
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(there) == 3
    assert export_geneval(pipe, prompts, out, steps=1, samples=2, batch=1, progress=False) == 3
    assert {path: path.stat().st_mtime_ns for path in there} == there and len(passes) == 7
    assert export_geneval(pipe, prompts, out, steps=1, samples=2, batch=1, progress=False) == 0
    hook.remove()
    for path in whole.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"holds pictures with steps 1, not 2, seed 0, not 3: give another"):
        export_geneval(pipe, prompts, out, steps=2, samples=2, seed=3, progress=False)
    with pytest.raises(UserError, match=r"takes no prompts \(it draws from 1000 class labels"):
        export_geneval(tiny_pipeline("dit"), prompts, tmp_path / "other", progress=False)


def test_one_picture_of_one_prompt_is_an_export(pipe: Any, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text(json.dumps(ROWS[0]))
    assert export_geneval(pipe, prompts, tmp_path / "out", steps=1, samples=1, progress=False) == 1


def test_geneval_2_also_gets_the_table_of_its_pictures(pipe: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "geneval2_data.jsonl", tmp_path / "out"
    rows = [{"prompt": prompt, "vqa_list": [["Is it?", "Yes"]]} for prompt in ("two cows", "a cow")]
    file.write_text("\n".join(map(json.dumps, rows)))
    export_geneval(pipe, file, out, steps=1, samples=1, progress=False)
    table = json.loads((out / "image_paths.json").read_text())
    assert list(table) == ["two cows", "a cow"] and all(Path(path).is_file() for path in table.values())


def test_bad_input_is_one_line(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("x")
    Path("damaged").mkdir()
    Path("damaged/export.json").write_text("{")
    Path("plain.txt").write_text("a photo of a cat\n")
    Path("empty.jsonl").write_text("\n")
    bad = {
        "geneval gone --prompts evaluation_metadata.jsonl --output o": "pipeline gone does not exist",
        "geneval emoji --prompts gone.jsonl --output o": "--prompts gone.jsonl cannot be read",
        "geneval emoji --prompts plain.txt --output o": "line 1 is no object with a prompt",
        "geneval emoji --prompts empty.jsonl --output o": "empty.jsonl holds no line",
        "geneval emoji --prompts evaluation_metadata.jsonl --output full": "full holds other files",
        "geneval emoji --prompts evaluation_metadata.jsonl --output damaged": "export.json is damaged",
        "geneval emoji --prompts evaluation_metadata.jsonl --output plain.txt": "is a file; give a folder",
    }
    for command, says in bad.items():
        monkeypatch.setattr(sys, "argv", ["stepdistill", *command.split()])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("stepdistill: ") and says in told and told.count("\n") == 1
    assert not Path("o").exists()


def test_the_command_draws_with_the_embedded_teacher(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = f"geneval emoji --prompts {prompts} --output out --steps 1 --samples 2"
    monkeypatch.setattr(sys, "argv", ["stepdistill", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and capsys.readouterr().out.strip() == "out: 6 pictures drawn"
    assert Image.open("out/00002/samples/0001.png").size == (32, 32)
    assert json.loads(Path("out/export.json").read_text())["pipeline"].endswith("emoji")
