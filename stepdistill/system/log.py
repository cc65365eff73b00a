"""What a run writes down while it goes: stats.jsonl, log.txt, the progress bar, and lines that do not break the bar."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from tqdm import tqdm

from stepdistill.errors import UserError
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import LARGEST, parse_json

STATS = "stats.jsonl"
LARGEST_NUMBER = 1e300
"""Of a row: of smaller ones sums and curves can be made."""
Value = float | str | Sequence[str]
"""What a row of stats.jsonl has under a name."""


class _Bar(tqdm):  # type: ignore[misc]
    """Goes on where the time of day is set back: tqdm waits until that time has come again."""

    _time = property(lambda self: time.monotonic, lambda self, clock: None)


def bar(
    total: int | None, label: str, *, unit: str = "it", first: int = 0, shown: bool = True, lazy: bool = False
) -> Any:
    """A tqdm bar on stderr with rate and time left; ``.update(n)`` moves it, ``.close()`` ends it.

    Args:
        total: units from the very start of the work; None where it is not known.
        label: what is being done.
        unit: what one unit is called.
        first: units that were done before, by the run that is resumed.
        shown: False for a silent bar, as on every process but the first.
        lazy: shown with its first move only, for work that may turn out to be done.
    """
    delay = 1e-9 if lazy else 0.0
    return _Bar(
        total=total, initial=first, desc=label, unit=unit, disable=not shown, dynamic_ncols=True, delay=delay
    )


def quiet_loading() -> None:
    """Switches off the bars that diffusers and transformers show for every component they load."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def say(text: str) -> None:
    """One line on stderr that does not break a bar."""
    tqdm.write(text, file=sys.stderr)


def utc_now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Kept:
    """A stream whose lines a file gets, too, each as it stands in a terminal in the end: of a bar its last state.

    Args:
        stream: what is written to.
        file: gets the lines, each behind the time.
    """

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file, self._line = stream, file, ""
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rpartition("\r")[2].rstrip()
            if shown and not self._file.closed:
                self._file.write(f"{time.strftime('%H:%M:%S')} {shown}\n")
                self._file.flush()
        self._line = self._line.rpartition("\r")[2]
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextlib.contextmanager
def stderr_kept(file: Path, title: str) -> Iterator[Callable[[str], object]]:
    """Inside the ``with`` all that this process says on stderr is in a file, too, behind what was there. What it gives
    writes to that file alone.

    Args:
        file: log.txt.
        title: one line before it; the date is put to it.
    """
    with file.open("a", encoding="utf-8") as opened:
        opened.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        opened.flush()
        with contextlib.redirect_stderr(cast(TextIO, _Kept(sys.stderr, opened))):
            yield lambda text: opened.write(text.rstrip() + "\n")


class RunLog:
    """stats.jsonl and the bar of one run, as a context manager.

    Args:
        folder: run folder; stats.jsonl is appended to, one JSON object a line.
        total: updates of the whole run.
        first: the update this process starts at. Lines of later ones, left by a run that was killed after its last
            checkpoint, are dropped, so that a resumed run's file is that of an unbroken one.
        main: False on every process but the first, where nothing is written or shown.
    """

    def __init__(self, folder: Path, total: int, *, first: int = 0, main: bool = True) -> None:
        self._bar = bar(total, "train", unit="update", first=first, shown=main)
        self._folder, self._main = folder, main
        self._file: TextIO | None = None
        self._keep(first)

    def _keep(self, first: int) -> None:
        """Drops the lines of the update ``first`` and of later ones."""
        if self._main:
            kept = [line for line in read_stats(self._folder) if line["update"] < first]
            with written_whole(self._folder / STATS) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self._file = (self._folder / STATS).open("a", encoding="utf-8")

    def back_to(self, update: int) -> None:
        """The run went back to where ``update`` was the next one."""
        if self._file is not None:
            self._file.close()
        self._keep(update)
        self._bar.n = update
        self._bar.refresh()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def update(self, update: int, values: Mapping[str, Value], *, shown: tuple[str, ...] = ("loss",)) -> None:
        """Writes one line for the update ``update`` (from 0) and moves the bar.

        Args:
            update: the one that has just ended.
            values: numbers and texts (such as the updated network's name); not-finite numbers are written as null.
            shown: the names that stand beside the bar.
        """
        if self._file is not None:
            line = {"update": update} | {name: _jsonable(value) for name, value in values.items()}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        beside = {name: values[name] for name in shown if name in values}
        self._bar.set_postfix(beside, refresh=False)
        self._bar.update(1)

    def note(self, text: str) -> None:
        """One line above the bar, on the first process only."""
        if not self._bar.disable:
            say(text)


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's stats.jsonl, oldest first; a line that a kill cut short is left out. Each has its ``update``
    and ``network``; ``phase`` is a text, ``worries`` texts, and what else is there a number or None.

    Raises:
        UserError: it cannot be read, or a line is of another kind.
    """
    if not (folder / STATS).is_file():
        return []
    try:
        lines = (folder / STATS).read_text(encoding="utf-8").split("\n")
        # The last piece is empty after a whole line, and half a line after a kill.
        rows = [parse_json(line) for line in lines[:-1]]
    except ValueError as error:
        raise UserError(f"{folder / STATS} cannot be read: {error}") from None
    if rows and isinstance(rows[0], dict) and "update" not in rows[0]:
        raise UserError(
            f"{folder / STATS} has the columns of an earlier version (no `update`): train into a new folder"
        )
    for number, row in enumerate(rows, 1):
        if wrong := wrong_in(row):
            raise UserError(
                f"{folder / STATS}: line {number} is not what a run writes ({wrong}): take the line out"
            )
    return rows


def wrong_in(row: Any) -> str:
    """What a row of stats.jsonl has that a run does not write; empty where there is nothing."""
    if not isinstance(row, dict):
        return "no table of numbers"
    update = row.get("update")
    if type(update) is not int or not 0 <= update < LARGEST:
        return "its update is no number of one"
    for name, value in row.items():
        if name == "worries":
            right = isinstance(value, list) and all(isinstance(each, str) for each in value)
        elif name in ("network", "phase"):
            right = isinstance(value, str)
        else:
            right = value is None or (
                type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER
            )
        if not right:
            return (
                f"its {name[:40]} is {'no text' if name in ('network', 'phase', 'worries') else 'no number'}"
            )
    return "" if "network" in row else "it has no network"


def _jsonable(value: Value) -> float | str | list[str] | None:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return list(value)
    return float(value) if -LARGEST_NUMBER < value < LARGEST_NUMBER else None
