"""One run for each of several methods on one teacher, each in a process of its own, and their pictures side by side.

A process of its own gives every run its own peak memory, its own random state, and a failure that stays its own. Runs
that have a report are kept, interrupted ones go on from their last checkpoint, failed ones are tried again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.comparison.page import Comparison, write
from stepdistill.comparison.plan import Entry, Plan
from stepdistill.comparison.shared import told, with_shared
from stepdistill.errors import UserError
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.log import read_stats, say
from stepdistill.system.run_folder import RunFolder, read_status
from stepdistill.training.identity import differences
from stepdistill.training.run_report import Measured, read_report

PROGRESS_SECONDS = 60
"""Time between two lines on a run that is under way."""

WAIT_SECONDS = 2
"""Time between two looks at a run that an earlier comparison has left."""


def train_all(
    wanted: Plan, folder: Path, after_each: Callable[[dict[str, Measured], dict[str, str]], object]
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Trains what is not there yet, one run at a time; reports and errors by run.

    Args:
        wanted: the runs.
        folder: each run is ``folder/NAME``, what it printed ``folder/NAME.log``.
        after_each: called with both after every run.

    Raises:
        UserError: a finished run in the folder is of another recipe.
    """
    entries = with_shared(wanted.entries, folder)
    for entry in entries:
        _check_same_recipe(entry, folder / entry.name)
    reports: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        label = f"[{number}/{len(wanted.entries)}] {entry.name}"
        place = folder / entry.name
        _wait_for(place, label)
        if (place / "report.json").is_file():
            say(f"{label}: finished before")
        else:
            error = _train(entry, place, label)
            if error is not None:
                failed[entry.name] = error
                say(f"{label}: failed: {error} (all it said: {place}.log)")
        if entry.name not in failed:
            report = reports[entry.name] = read_report(place).model_copy(update={"name": entry.name})
            gaps = ", ".join(f"{gap:.3f} at {steps}" for steps, gap in report.gap_closed.items())
            scores = f"gap closed {gaps} step(s), " if gaps else ""
            say(f"{label}: {scores}trained {report.train_seconds or 0:.0f} s")
        after_each(reports, failed)
    return reports, failed


def _wait_for(place: Path, label: str) -> None:
    """A comparison that was killed leaves the run behind that was under way: that comes to its end first."""
    said = False
    while (status := read_status(place)) is not None and status.under_way and status.pid != os.getpid():
        if not said:
            say(
                f"{label}: process {status.pid}, which an earlier comparison has left, still trains it: waiting"
            )
        said = True
        time.sleep(WAIT_SECONDS)


def _check_same_recipe(entry: Entry, place: Path) -> None:
    if not (place / "report.json").is_file() or not (place / "recipe.yaml").is_file():
        return
    found = differences(load_recipe(place / "recipe.yaml"), entry.recipe)
    changed = [key for key in found if key not in ("data.pairs", "train.warm_starts")]  # where they lie
    if changed:
        raise UserError(
            f"{place} is a finished run of another recipe ({', '.join(changed)} differ): remove it, or give another "
            "--output"
        )


def _train(entry: Entry, place: Path, label: str) -> str | None:
    """Starts the run, or goes on with it; the error it ended with, or None."""
    from stepdistill.training.checkpoint import checkpoints_in

    own = RunFolder(place)
    resume = bool(checkpoints_in(own.checkpoints)) and (place / "recipe.yaml").is_file()
    if not resume:  # a run that was stopped before its first checkpoint was whole
        shutil.rmtree(own.checkpoints, ignore_errors=True)
    say(f"{label}: {'going on' if resume else 'training'} with {entry.source}")
    command = [sys.executable, "-m", "stepdistill", "train", entry.source, *entry.arguments]
    command += ["--output", str(place), *(["--resume"] if resume else [])]
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    place.parent.mkdir(parents=True, exist_ok=True)
    log = place.with_name(f"{place.name}.log")
    with log.open("a", encoding="utf-8") as file:
        # In a session of its own, so that Ctrl-C reaches it once, through _forwarded.
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        with _forwarded(child):
            while True:
                try:
                    status = child.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    _tell(place, label, entry.recipe.train.updates)
    if status == 0 and (place / "report.json").is_file():
        return None
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text("utf-8")) if line.strip()]
    said = lines[-1].removeprefix("stepdistill: ") if lines else "it said nothing"
    return said if status >= 0 else f"stopped by signal {-status}; {said}"


def _tell(place: Path, label: str, planned: int) -> None:
    stats = read_stats(place)
    if stats:
        say(f"{label}: {stats[-1]['update'] + 1} of {planned} updates, {stats[-1]['seconds']:.0f} s")


@contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C and SIGTERM stop the child after its step, and then this process."""

    def ask(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    own_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, ask) if own_thread else None
    try:
        yield
    except BaseException:
        child.send_signal(signal.SIGINT)
        say("stopping after the step under way; the same command goes on from there")
        child.wait()
        raise
    finally:
        if own_thread:
            signal.signal(signal.SIGTERM, before)


def compare_methods(wanted: Plan, folder: Path, command: str) -> Comparison:
    """Trains what a plan asks for under ``folder``, the page written anew after every run; see :func:`train_all`."""

    shared = told(wanted.entries)

    def compared(reports: dict[str, Measured], failed: dict[str, str]) -> Comparison:
        folders = [folder / name for name in reports]
        origin = {"command": command}
        return Comparison(
            list(reports.values()), folders, failed, wanted.without_recipe, wanted.repeats, origin, shared
        )

    return compared(*train_all(wanted, folder, lambda *so_far: write(compared(*so_far), folder)))
