"""One run for each of several methods on one teacher, each in a process of its own, and their pictures side by side.

A process of its own gives every run its own peak memory, its own random state, and a failure that stays its own. Runs
that have a report are kept, interrupted ones go on from their last checkpoint, failed ones are tried again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stepdistill.comparison.page import Comparison, write
from stepdistill.errors import UserError, did_you_mean
from stepdistill.recipes.recipe import DEFAULT_TEACHER, Recipe, load_recipe
from stepdistill.system.log import read_stats, say
from stepdistill.system.run_folder import RunFolder
from stepdistill.system.shipped import content_folder, module_summaries, recipe_files
from stepdistill.training.identity import differences
from stepdistill.training.preflight import check_recipe
from stepdistill.training.run_report import Measured, RunReport, read_report

PROGRESS_SECONDS = 60
"""Time between two lines on a run that is under way."""


@dataclass(frozen=True)
class Entry:
    """One run that is to be there.

    Attributes:
        name: of its folder.
        source: what ``stepdistill train`` is given: a shipped recipe's name or a file.
        arguments: what follows it.
        recipe: what that gives.
    """

    name: str
    source: str
    arguments: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, and the methods of ``all`` that have no recipe."""

    entries: tuple[Entry, ...]
    without_recipe: tuple[str, ...]


def seconds_of(text: str) -> float:
    """A time such as 90s, 10m or 1.5h; a plain number is seconds.

    Raises:
        UserError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UserError(f"--budget {text}: give a time such as 90s, 10m or 1h")
    return seconds


def plan(methods: str, teacher: str, budget: float = 0.0, sets: Sequence[str] = ()) -> Plan:
    """What is to be trained; reads recipes alone.

    Args:
        methods: ``all``, or names of methods or shipped recipes and recipe files, separated by commas.
        teacher: of every run.
        budget: seconds of training of each run; 0 sets no limit.
        sets: assignments laid over every recipe.

    Raises:
        UserError: a name that is neither, a method without a recipe, or a recipe that is not valid.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    known, shipped = module_summaries("methods"), recipe_files()
    everything = names == ["all"]
    sources: list[str] = []
    without: list[str] = []
    for name in known if everything else dict.fromkeys(names):
        if name.endswith((".yaml", ".yml")) or name in shipped:
            sources.append(name)
        elif name not in known:
            raise UserError(
                f"--methods: {name} is neither a method nor a recipe {did_you_mean(name, [*known, *shipped])}; a "
                "method of your own is given by its recipe file, such as my_recipe.yaml"
            )
        elif (found := recipe_of(name, teacher, budget)) is not None:
            sources.append(found)
        else:
            without.append(name)
    if (without and not everything) or not sources:
        able = [name for name in known if recipe_of(name, teacher, budget) is not None]
        raise UserError(
            f"--methods: no recipe is shipped for {', '.join(without) or 'nothing'}: write one (train/recipes has "
            f"examples) and give its file; there are recipes for {', '.join(able) or 'no method'}"
        )
    more = [*sets, *([f"train.budget_seconds={budget:g}"] if budget else [])]
    entries = []
    for source in sources:
        recipe = load_recipe(source, teacher=teacher, sets=more)
        check_recipe(recipe)
        arguments = ["--teacher", teacher, *(part for one in more for part in ("--set", one))]
        entries.append(Entry(Path(source).stem, source, tuple(arguments), recipe))
    twice = {entry.name for entry in entries if [other.name for other in entries].count(entry.name) > 1}
    if twice:
        raise UserError(f"--methods: two recipes are called {sorted(twice)[0]}; rename one")
    return Plan(tuple(entries), tuple(without))


def recipe_of(method: str, teacher: str, budget: float = 0.0) -> str | None:
    """The shipped recipe that stands for a method on a teacher, or None.

    Of the recipes of that method on that teacher: METHOD_TEACHER before others, the larger before the smaller; with a
    budget, the first whose training took no longer when its result in train/results was made (the smallest where none
    did). Teachers without recipes of their own take those of the embedded one.
    """
    shipped = recipe_files()
    for place in dict.fromkeys((Path(teacher).name, DEFAULT_TEACHER)):
        trees = {name: _tree(file) for name, file in shipped.items()}
        sizes = {
            name: _samples(tree)
            for name, tree in trees.items()
            if (tree.get("method"), tree.get("teacher")) == (method, place)
        }
        if sizes:
            ranked = sorted(sizes, key=lambda name: (name != f"{method}_{place}", -sizes[name]))
            fitting = [name for name in ranked if not budget or _measured_seconds(name) <= budget]
            return fitting[0] if fitting else min(ranked, key=lambda name: sizes[name])
    return None


@cache
def _tree(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    return tree


def _samples(tree: dict[str, Any]) -> int:
    train = tree.get("train") or {}
    return int(train.get("updates", 1000)) * int(train.get("batch", 64))


def _measured_seconds(name: str) -> float:
    """Training time of a recipe's shipped result; 0 where there is none."""
    file = content_folder("train") / "results" / f"{name}.json"
    seconds = json.loads(file.read_text(encoding="utf-8")).get("train_seconds", 0) if file.is_file() else 0
    return float(seconds)


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
    for entry in wanted.entries:
        _check_same_recipe(entry, folder / entry.name)
    reports: dict[str, Measured] = {}
    failed: dict[str, str] = {}
    for number, entry in enumerate(wanted.entries, 1):
        label = f"[{number}/{len(wanted.entries)}] {entry.name}"
        place = folder / entry.name
        if (place / "report.json").is_file():
            say(f"{label}: finished before")
        else:
            error = _train(entry, place, label)
            if error is not None:
                failed[entry.name] = error
                say(f"{label}: failed: {error} (all it said: {place}.log)")
        if entry.name not in failed:
            report = read_report(place)
            if report.student.get("fd"):
                reports[entry.name] = report
                gaps = (f"{gap:.3f} at {steps}" for steps, gap in report.gap_closed.items())
                say(
                    f"{label}: gap closed {', '.join(gaps)} step(s), trained {report.train_seconds or 0:.0f} s"
                )
            else:
                failed[entry.name] = "it was not evaluated: set evaluate to a suite (--set evaluate=SUITE)"
        after_each(reports, failed)
    return reports, failed


def _check_same_recipe(entry: Entry, place: Path) -> None:
    if not (place / "report.json").is_file() or not (place / "recipe.yaml").is_file():
        return
    changed = differences(load_recipe(place / "recipe.yaml"), entry.recipe)
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

    def compared(reports: dict[str, Measured], failed: dict[str, str]) -> Comparison:
        folders = [folder / name for name in reports]
        return Comparison(
            list(reports.values()), folders, failed, wanted.without_recipe, {"command": command}
        )

    return compared(*train_all(wanted, folder, lambda *so_far: write(compared(*so_far), folder)))


def collect(paths: Sequence[str], command: str) -> Comparison:
    """Finished runs and evaluations by their folders or reports.

    Raises:
        UserError: one of them is none.
    """
    reports = [read_report(path) for path in paths]
    names = [report.name for report in reports]
    reports = [
        report.model_copy(update={"name": str(path)}) if names.count(report.name) > 1 else report
        for report, path in zip(reports, paths, strict=True)
    ]  # of one name: told apart by where they lie
    folders = [Path(path) if Path(path).is_dir() else Path(path).parent for path in paths]
    kept = [
        place if isinstance(report, RunReport) or any(place.glob("steps_*/gallery.safetensors")) else None
        for report, place in zip(reports, folders, strict=True)
    ]  # a file of an evaluation may lie anywhere
    return Comparison(reports, kept, origin={"command": command})


def write_all(compared: Comparison, folder: Path) -> Path:
    """The page with the students' pictures, where all runs have a student of one teacher, or else with those that the
    evaluations kept; gives back the page."""
    from stepdistill.comparison import pictures

    rows = [
        (report.name, place, report)
        for report, place in zip(compared.reports, compared.folders, strict=True)
        if place is not None and (place / "student" / "verification" / "manifest.json").is_file()
    ]
    teachers = {str(report.teacher_name) for _, _, report in rows}
    picture = None
    if len(teachers) == 1:
        guidance = rows[0][2].guidance or 1.0
        try:
            picture = pictures.draw_students(
                [(name, place) for name, place, _ in rows], teachers.pop(), guidance
            )
        except UserError as error:
            say(f"no pictures: {error}")
    elif not rows:
        picture = pictures.kept_pictures(compared)
    return write(compared, folder, picture)
