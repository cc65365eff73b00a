"""train --dry-run says what would run and what it takes, and leaves the disk as it was."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from stepdistill.cli import main


@pytest.mark.slow
def test_a_dry_run_says_all_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = "options.pairs=8 options.pair_steps=2 train.batch=4 options.fake_warm_start=2 options.warm_start=3"
    arguments = ["--method", "dmd", "--updates", "9", "--set", "data.prompts=one.txt"]
    (tmp_path / "one.txt").write_text("apple\ncar\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "stepdistill",
            "train",
            *arguments,
            *(part for one in sets.split() for part in ("--set", one)),
            "--dry-run",
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    recipe, _, rest = said.partition("\n\nrecipe: ")
    assert yaml.safe_load(recipe)["train"]["updates"] == 9
    lines = rest.splitlines()
    assert lines[0] == "dmd_emoji_quick (as shipped: two to five minutes on two CPU cores)"
    assert lines[1].startswith("differs from dmd_emoji_quick as shipped: options.pairs 8 (there 3072), ")
    assert "data.prompts one.txt (there null), train.updates 9 (there 750)" in lines[1]
    assert re.match(r"memory: 0\.\d\d GiB on cpu", lines[2]) and lines[3].startswith(
        "disk: checkpoints (2 kept) "
    )
    assert lines[4] == "pairs of the teacher: 8 of 2 network calls"
    assert lines[5] == "updates: 9: 5 of the student, 4 of the fake score"
    assert re.match(
        r"time: [\d.]+ (s|min|h) of pairs and [\d.]+ (s|min|h) of updates, from three units", lines[6]
    )
    assert lines[7:] == ["dry run: nothing was written"]
    assert [file.name for file in tmp_path.iterdir()] == ["one.txt"]
