"""A run's folder: its log, its status, its link, and the modes of its files."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepdistill.errors import UserError
from stepdistill.system.log import bar, say
from stepdistill.system.run_folder import RunFolder, RunStatus, Status, read_status
from stepdistill.training.record import recorded


def test_the_log_has_what_a_terminal_shows_in_the_end(tmp_path: Path) -> None:
    """A said line, and of a bar its last state, not the ten before it."""
    status = RunStatus(tmp_path / "run", 10)
    for title in ("first", "second"):
        with recorded(tmp_path / "run", status, title):
            shown = bar(10, "train")
            for i in range(10):
                if i == 5:
                    say(f"{title}: half of it")
                shown.update(1)
                shown.refresh()
            shown.close()
    lines = [line[9:] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert [line for line in lines if "half" in line] == ["first: half of it", "second: half of it"]
    assert [line.split("|")[0] for line in lines if "train:" in line] == ["train: 100%"] * 2
    assert len(lines) == 6  # and two titles


def test_a_status_says_how_far_a_run_is_and_why_it_stopped(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, 100)
    with pytest.raises(ZeroDivisionError), recorded(tmp_path, status, "train"):
        first = read_status(tmp_path)
        assert first == replace(status.now) and (first.state, first.going) == ("preparing", True)
        status.trained(25, 50.0, "healthy")
        now = read_status(tmp_path)
        assert now is not None and (now.update, now.updates, now.eta_seconds) == (25, 100, 150.0)
        assert (now.pid, now.host, now.health) == (os.getpid(), platform.node(), "healthy")
        status.trained(26, 52.0)  # within a second of the last one
        assert read_status(tmp_path) == now
        1 / 0  # noqa: B018
    ended = read_status(tmp_path)
    assert ended is not None and (ended.state, ended.phase) == (
        "stopped",
        "ZeroDivisionError: division by zero",
    )
    assert not ended.going and "Traceback" in (tmp_path / "log.txt").read_text()
    short = RunStatus(tmp_path, 100, budget_seconds=60)
    short.trained(25, 50.0)
    assert short.now.eta_seconds == 10
    (tmp_path / "status.json").write_text('{"state": ')
    assert read_status(tmp_path) is None


def test_a_run_whose_process_is_gone_was_killed() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Status("training", "training", 1, 2, pid=gone.pid).killed
    assert not Status("done", "done", 2, 2, pid=gone.pid).killed
    assert not Status("training", "training", 1, 2, pid=gone.pid, host="another machine").killed
    own = Status("training", "training", 1, 2)
    assert not own.killed and own.under_way
    # This number was another process's then, as its start of an earlier version's status says.
    before = replace(own, written="2020-01-01T00:00:00+00:00", boot="", uptime=0.0)
    assert before.killed and not before.under_way


def test_a_mistake_leaves_no_folder_and_a_run_that_began_stays(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    status = RunStatus(folder, 1)
    with pytest.raises(UserError), recorded(folder, status, "train"):
        raise UserError("no such teacher")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError), recorded(folder, status, "train"):
        RunFolder(folder).begin()
        RunFolder(folder).recipe.write_text("")
        raise UserError("no\nroom")
    assert status.now.phase == "no room" and "error: no\nroom" in RunFolder(folder).log.read_text()


def test_latest_is_the_newest_run_of_a_folder_called_runs(tmp_path: Path) -> None:
    for name in ("first", "second"):
        RunFolder(tmp_path / "runs" / name).begin()
        assert os.readlink(tmp_path / "runs" / "latest") == name
    RunFolder(tmp_path / "other" / "first").begin()
    assert not (tmp_path / "other" / "latest").exists()
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").mkdir()  # somebody's own
    RunFolder(tmp_path / "runs" / "third").begin()
    assert (tmp_path / "runs" / "latest").is_dir() and not (tmp_path / "runs" / "latest").is_symlink()


def test_the_folder_of_an_earlier_version_is_told_in_one_line(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    place.recipe.write_text("")
    place.check_layout()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"is a run of an earlier version \(checkpoints lies at its top"):
        place.check_layout()
