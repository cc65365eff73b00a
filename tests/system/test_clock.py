"""The time of day is set back by a day, or is another one on another machine: what it was used for goes on rightly."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import tqdm.std
from run_folders import write_run, write_status

from stepdistill.cli import doctor_run
from stepdistill.data.shards import DamagedShard, Shards
from stepdistill.system.clock import boot, uptime
from stepdistill.system.log import bar
from stepdistill.system.run_folder import Status, read_status
from stepdistill.training.checkpoint import checkpoints_in, save_checkpoint
from stepdistill.training.run_record import read_run
from stepdistill.watching.site import Site

DAY = 86400
TOMORROW = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")
linux = pytest.mark.skipif(not boot(), reason="this system does not name its starts")


@linux
def test_a_process_is_known_by_the_time_since_the_machine_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = uptime()
    time.sleep(1.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        its = Status("training", "training", 1, 2, pid=child.pid, written=TOMORROW)
        assert its.under_way and its.silent_seconds is not None and its.silent_seconds < 60
        assert replace(
            its, uptime=earlier
        ).killed  # its number was another process's, whatever the clock said then
        assert replace(its, boot="an earlier start").killed
        folder = write_run(tmp_path / "run", None, stats=False)
        write_status(folder, "training", pid=child.pid, written=TOMORROW, boot=boot(), uptime=uptime())
        monkeypatch.setattr(doctor_run, "SILENT", 0)
        time.sleep(0.01)
        (state,) = (found.text for found in doctor_run.examine_run(folder) if found.subject == "state")
        assert state.startswith("stuck, it seems: nothing was heard of it for 0 minutes")
        assert " s ago</td>" in Site(tmp_path).answer("/").text
        child.communicate(b"\n")
    assert its.killed


def test_of_a_clock_that_is_ahead_no_time_since_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", None)
    write_status(folder, "training", written=TOMORROW, host="another machine")
    status, run = read_status(folder), read_run(folder)
    assert status is not None and status.silent_seconds is None
    assert run.going and run.about_state.startswith("Whether it goes on is not known")
    (state,) = (found.text for found in doctor_run.examine_run(folder) if found.subject == "state")
    assert "by a clock that is ahead of this machine's" in state
    assert "<td>not known</td>" in Site(tmp_path).answer("/").text
    write_status(folder, "training", written="2020-01-01T00:00:00+00:00", host="another machine")
    assert read_run(folder).state == "silent"
    (folder / "status.json").unlink()
    os.utime(folder / "recipe.yaml", (time.time() + DAY,) * 2)
    assert " 0 s ago" in Site(tmp_path).answer("/").text.replace("<td>", " ")


def test_checkpoints_and_altered_shards_are_told_by_more_than_their_dates(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        made = save_checkpoint(tmp_path / "c", step, {"a": {"w": torch.zeros(2)}}, {}, keep=2)
        for file in (*made.iterdir(), made):
            os.utime(file, (time.time() - step * DAY,) * 2)
    assert [place.name for place in checkpoints_in(tmp_path / "c")] == ["step-00000002", "step-00000003"]

    shards = Shards(tmp_path / "s", "rows")
    shards.folder.mkdir()
    for number in (0, 1):
        shards.write(number, {"x": torch.arange(8.0)})
    assert shards.missing([0, 1, 2]) == [2] and shards.missing([0, 1]) == []
    file = shards.file(1)
    content = bytearray(file.read_bytes())
    place = content.rindex(torch.arange(8.0).numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, (time.time() - DAY,) * 2)
    with pytest.raises(DamagedShard):
        Shards(tmp_path / "s", "rows").missing([0, 1])


def test_a_bar_moves_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = bar(4, "train")
    now = time.time
    monkeypatch.setattr(tqdm.std, "time", lambda: now() - DAY)
    for _ in range(4):
        time.sleep(0.11)
        shown.update(1)
    assert "| 3/4 [" in capsys.readouterr().err
    shown.close()
