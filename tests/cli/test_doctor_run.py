"""``doctor RUN``: what it says of runs that are done, diverged, killed or strange, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from stepdistill.cli import doctor_run, main
from stepdistill.cli.doctor_run import examine_run
from stepdistill.errors import UserError
from stepdistill.system.log import RunLog
from stepdistill.system.run_folder import RunFolder, RunStatus
from stepdistill.training.run_report import Health, RunReport, Start, Worry

COLLAPSE = "collapse: pictures differ by 0.010, the teacher's by 0.200"
TEACHER = {"teacher_diversity": 0.2, "teacher_saturation": 0.1}


def run_folder(root: Path, updates: int = 20) -> tuple[RunFolder, RunStatus]:
    """A run of so many updates of 100, with a preview every other one; the last shows a collapse."""
    place, status = RunFolder(root), RunStatus(root, 100)
    place.begin()
    place.recipe.write_text("teacher: emoji\n")
    with RunLog(root, 100) as log:
        for i in range(updates):
            looked = {"diversity": 0.2, "saturation": 0.1, **TEACHER, "worries": list[str]()}
            if i == updates - 1:
                looked |= {
                    "diversity": 0.01,
                    "worries": ["collapse: pictures differ by 0.010, the teacher's by 0.200"],
                }
            more = looked if i % 2 else {}
            log.update(
                i, {"network": "student", "loss": 10.0 - i / 4, "grad_norm": 1.0, **more, "seconds": 2.0 * i}
            )
    status.trained(updates, 2.0 * updates, "collapse")
    return place, status


def said(root: Path) -> dict[str, list[tuple[str, str]]]:
    """State and text by subject."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in examine_run(root):
        found.setdefault(finding.subject, []).append((finding.state, finding.text))
    return found


def test_a_training_of_which_nothing_is_heard_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of process 1, which began before all that is written here; 50 updates of 1.9 seconds are not long."""
    place, _ = run_folder(tmp_path)
    monkeypatch.setattr(doctor_run, "SILENT", 0)
    state = json.loads(place.status.read_text())
    began = datetime.fromtimestamp(psutil.Process(1).create_time(), UTC)
    for seconds, stuck in ((60, False), (120, True)):
        written = max(datetime.now(UTC) - timedelta(seconds=seconds), began)
        other = {"pid": 1, "boot": "", "written": written.isoformat()}
        place.status.write_text(json.dumps({**state, **other}))
        ((kind, text),) = said(tmp_path)["state"]
        assert (kind == "broken") == stuck and text.startswith("stuck, it seems: nothing was heard") == stuck
        assert ("end process 1 on" in said(tmp_path)["to do"][-1][1]) == stuck


def test_a_killed_run_is_gone_on_with_from_its_checkpoint(tmp_path: Path) -> None:
    place, _ = run_folder(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state = json.loads(place.status.read_text())
    place.status.write_text(json.dumps({**state, "pid": gone.pid}))
    for update in (5, 10):
        (place.checkpoints / f"step-{update:08d}").mkdir(parents=True)
        (place.checkpoints / f"step-{update:08d}" / "state.json").write_text(f'{{"step": {update}}}')
    (place.checkpoints / "step-00000015").mkdir()  # without its state: cut off
    found = said(tmp_path)
    assert found["state"][0][0] == "broken"
    assert found["state"][0][1].startswith(
        f"killed while training: its process {gone.pid} is gone; last heard of 20"
    )
    assert found["updates"] == [("ok", "20 of 100 in 38 s")]
    assert found["loss of student"] == [("ok", "9.875 at the start, 5.375 at the end")]
    assert found["checkpoints"] == [("ok", "of update 5, 10")]
    assert found["student"] == [("note", "not exported yet")]
    assert found["update 2"] == [("ok", "diversity 0.20 (teacher 0.20), saturation 10% (teacher 10%)")]
    assert found["update 20"] == [("note", COLLAPSE)]
    assert len([subject for subject in found if subject.startswith("update ")]) == 5
    todo = [text for _, text in found["to do"]]
    assert todo[0] == f"stepdistill train --resume --output {tmp_path} goes on from update 10"
    assert todo[2].startswith("collapse: ")


def test_a_run_under_way_is_left_alone(tmp_path: Path) -> None:
    run_folder(tmp_path)
    found = said(tmp_path)
    assert found["state"][0][1].startswith("training: training (process ")
    assert found["updates"] == [("ok", "20 of 100 in 38 s, 160 s to go")]
    assert not any("resume" in text for _, text in found["to do"])


def test_a_diverged_run_says_what_to_lower(tmp_path: Path) -> None:
    _, status = run_folder(tmp_path)
    status.tell("stopped", "the loss of student is nan at update 21", health="diverged")
    found = said(tmp_path)
    assert found["state"] == [("broken", "stopped: the loss of student is nan at update 21")]
    assert found["to do"][0][1].startswith("lower train.lr or train.clip")


def test_a_finished_run_is_healthy_or_says_what_was_skipped(tmp_path: Path) -> None:
    place, status = run_folder(tmp_path)
    status.tell("done", "done", health="healthy")
    worry = Worry(update=20, what="collapse: it was")
    health = Health(
        verdict="healthy",
        sentence="",
        diversity=0.19,
        saturation=0.12,
        **TEACHER,
        skipped_files=2,
        worries=[worry],
    )
    report = RunReport(
        name="run",
        suite=None,
        n=0,
        student={},
        verification="",
        train_seconds=1,
        wall_seconds=1,
        peak_memory_bytes=1,
        health=health,
        resumes=[Start(command="train --resume", update=10)],
    )
    place.report.write_text(report.text())
    place.page.write_text("")
    (place.work / "pairs").mkdir()
    (place.work / "pairs" / "big").write_bytes(bytes(5000))
    line = (
        "healthy: diversity 0.19 (teacher 0.20), saturation 12% (teacher 10%), 1 warning while it trained, "
        "2 files skipped"
    )
    assert health.line() == line
    found = said(tmp_path)
    assert found["health"] == [("ok", line)]
    assert found["images"] == [("note", "2 were skipped: log.txt names them")]
    assert found["work"][0][1].endswith(f"KiB in {place.work}; it may be deleted")
    assert found["to do"] == [("note", f"open {place.page}")]


def test_a_foreign_folder_is_one_line_that_names_the_runs_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        run_folder(tmp_path / "runs" / name, 2)
    with pytest.raises(UserError, match=r"it has no recipe.yaml, but it holds 2 runs: a, b$"):
        examine_run(tmp_path / "runs")
    with pytest.raises(UserError, match=r"it has no recipe.yaml$"):
        examine_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stepdistill", "doctor", str(tmp_path / "runs" / "a")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None) and "to do" in capsys.readouterr().out
