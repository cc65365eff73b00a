"""All that a run's folder says of the run, read at once while it goes, when it ended, or on another machine. Imports no
torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.pages.numbers import duration
from stepdistill.pages.sheets import Sheet, read_sheet
from stepdistill.system.log import STATS, read_stats
from stepdistill.system.parsing import Unreadable
from stepdistill.system.parsing_yaml import parse_yaml
from stepdistill.system.run_folder import RunFolder, Status, moving, read_status
from stepdistill.training.identity import changed_keys
from stepdistill.training.run_report import read_report

QUIET_SECONDS = 600.0
"""A run of another machine that has not written for so long is taken to have stopped."""


@dataclass(frozen=True)
class RunRecord:
    """What a folder says.

    Attributes:
        folder: of the run.
        shown: the folder as commands on the page name it.
        status: where the run is; None where it does not say.
        report: report.json; empty before there is one.
        recipe: with every default; empty before there is one.
        changed: its keys that differ from the defaults.
        stats: the rows of stats.jsonl.
        unread: why some of it cannot be shown; empty where all can.
    """

    folder: RunFolder
    shown: str
    status: Status | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    changed: Sequence[str] = ()
    stats: Sequence[Mapping[str, Any]] = ()
    unread: str = ""

    @property
    def name(self) -> str:
        """The run's."""
        return str(self.report.get("name") or self.folder.root.resolve().name)

    @property
    def done(self) -> bool:
        """Whether it came to its end, and its report is of it."""
        return bool(self.report) and (self.status is None or self.status.state in ("done", "finishing"))

    @property
    def going(self) -> bool:
        """Whether it still goes on, as far as can be told."""
        status = self.status
        if status is None or not status.going or status.killed or self.done:
            return False
        return status.silent_seconds is None or status.silent_seconds < QUIET_SECONDS

    @property
    def state(self) -> str:
        """One word or two: ``training``, ``finished``, ``killed``."""
        if self.done:
            return "finished"
        if self.status is None:
            return "not known"
        if self.status.state == "stopped":
            return "stopped"
        if self.status.killed:
            return "killed"
        return str(self.status.state) if self.going else "silent"

    @property
    def about_state(self) -> str:
        """A sentence: what it does, or why it does no more."""
        status = self.status
        if self.done:
            return ""
        if status is None:
            return "This folder does not say where its run is: there is no status.json."
        if status.state == "stopped":
            return f"Stopped after {status.update:,} of {status.updates:,} updates: {status.phase}"
        at = f"{status.phase}, update {status.update:,} of {status.updates:,}"
        if status.killed:
            return f"Its process is gone. Its last word was: {at}."
        if not self.going:
            return (
                f"No word for {duration(status.silent_seconds or 0)} from {status.host}. The last was: {at}."
            )
        if status.silent_seconds is None:
            return (
                f"Whether it goes on is not known: its last word is of {status.written}, by a clock that is ahead of "
                f"this machine's. It was: {at}."
            )
        if status.state != "training":
            return f"{status.phase[:1].upper()}{status.phase[1:]}."
        left = f", about {duration(status.eta_seconds)} left" if status.eta_seconds is not None else ""
        return f"Update {status.update:,} of {status.updates:,}{left}."

    def samples(self) -> Sheet | None:
        """The teacher's pictures and the student's at the end; None where there are none."""
        return _sheet(self.folder.samples)

    def videos(self) -> bytes:
        """Some videos of the samples, or before the end of the last preview, as a .webp; of pictures nothing."""
        if self.done:
            return _moving(self.folder.samples)
        last = [*self.folder.previews().values()][-1:]
        return _moving(last[0]) if last else b""

    def previews(self, most: int) -> dict[int, Sheet]:
        """Some of the previews by update, the last one among them, evenly spread."""
        files = list(self.folder.previews().items())
        last, count = len(files) - 1, min(most, len(files))
        places = {last - round(i * last / max(1, count - 1)) for i in range(count)}
        chosen = [files[place] for place in sorted(places)]
        sheets = {update: _sheet(file) for update, file in chosen}
        return {update: sheet for update, sheet in sheets.items() if sheet is not None}

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(self.shown)


def read_run(folder: Path, shown: str | None = None, *, with_rows: bool = True) -> RunRecord:
    """What a run's folder says now; what is not there, or half written, is left out.

    Args:
        folder: of the run.
        shown: how commands name it; by default as given.
        with_rows: whether stats.jsonl is read.
    """
    place = RunFolder(folder)
    stats: list[dict[str, Any]] = []
    unread = ""
    try:
        stats = read_stats(folder) if with_rows else []
    except UserError as error:
        unread = str(error)
    except (OSError, ValueError) as error:
        unread = f"stats.jsonl cannot be read: {error}"
    report: dict[str, Any] = {}
    if place.report.is_file():
        try:
            report = read_report(place.report).model_dump(mode="json", by_alias=True)
        except UserError as error:
            unread = f"{unread}; {error}".removeprefix("; ")
    text = _text(place.recipe)
    return RunRecord(
        place,
        shown or str(folder),
        read_status(folder),
        report,
        _mapping(text),
        changed_keys(text),
        stats,
        unread,
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it says where the run is, or has a recipe and what it came to."""
    place = RunFolder(folder)
    beside = (place.report, folder / STATS)
    return place.status.is_file() or (place.recipe.is_file() and any(file.is_file() for file in beside))


def _text(file: Path) -> str:
    try:
        return (
            file.read_text(encoding="utf-8") if file.is_file() else ""
        )  # and no pipe, of which no end comes
    except (OSError, UnicodeDecodeError):
        return ""


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = parse_yaml(text)
    except Unreadable:
        return {}
    return found if isinstance(found, dict) else {}


def _moving(file: Path) -> bytes:
    """A .webp beside a sheet; nothing where there is none, or it is none."""
    try:
        data = moving(file).read_bytes()
    except OSError:
        return b""
    return data if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else b""


def _sheet(file: Path) -> Sheet | None:
    try:
        return read_sheet(file.read_bytes()) if file.is_file() else None
    except OSError:
        return None
