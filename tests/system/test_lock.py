"""A run's folder is one process's at a time, and a process that was killed holds nothing."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.errors import UserError
from stepdistill.system import lock as lock_module
from stepdistill.system.lock import locked
from stepdistill.system.run_folder import RunFolder, held

HOLDER = """
import sys, time
from pathlib import Path
from stepdistill.system.run_folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that trains there."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_told_whose_the_folder_is_and_a_kill_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as other:
        place = RunFolder(folder)
        place.log.write_text("of the other")
        says = rf"run is used by another process \({other.pid} on {platform.node()}, since 20.*give another --output"
        with pytest.raises(UserError, match=says), held(folder):
            raise AssertionError("two are in it")
        assert place.log.read_text() == "of the other" and place.lock.is_file()
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert place.lock.is_file()  # left, and of no weight
        with held(folder):
            pass
        assert not place.lock.exists()


def test_who_waits_at_a_file_that_was_removed_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold two files of one name."""
    file, plain, opened = tmp_path / "lock", os.open, []

    def removed(path: Path, flags: int, mode: int = 0o777) -> int:
        number = plain(path, flags, mode)
        if not opened:
            file.unlink()  # by who held it, between the opening and the locking
        opened.append(number)
        return number

    monkeypatch.setattr(lock_module.os, "open", removed)
    with locked(file, "it"):
        assert len(opened) == 2 and str(os.getpid()) in file.read_text()


def test_a_file_system_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "lockf", none)
    with locked(tmp_path / "lock", "it"):
        pass
    assert "its file system has no locks (Operation not supported)" in capsys.readouterr().err


def test_what_killed_processes_left_half_done_goes_and_a_mistake_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    checkpoints = RunFolder(folder).checkpoints
    (checkpoints / ".step-00000004.part").mkdir(parents=True)
    (checkpoints / ".step-00000002.77.old").mkdir()
    (checkpoints / "step-00000003").mkdir()
    (folder / ".status.json.77.part").touch()
    with held(folder):
        left = sorted(path.name for path in folder.rglob("*"))
    assert left == [".lock", "checkpoints", "step-00000003", "work"]
    with pytest.raises(UserError, match="mistaken"), held(tmp_path / "none" / "b"):
        RunFolder(tmp_path / "none" / "b").log.touch()
        raise UserError("mistaken")
    assert not (tmp_path / "none").exists()
