"""What a run writes down while it goes: stats.jsonl, the progress bar, and lines that do not break the bar."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from stepdistill.system.files import written_whole

STATS = "stats.jsonl"


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
    return tqdm(
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


class RunLog:
    """stats.jsonl and the bar of one run, as a context manager.

    Args:
        folder: run folder; stats.jsonl is appended to, one JSON object a line.
        total: optimiser steps of the whole run.
        first: the step this process starts at. Lines of later steps, left by a run that was killed after its last
            checkpoint, are dropped, so that a resumed run's file is that of an unbroken one.
        main: False on every process but the first, where nothing is written or shown.
    """

    def __init__(self, folder: Path, total: int, *, first: int = 0, main: bool = True) -> None:
        self._bar = bar(total, "train", unit="step", first=first, shown=main)
        self._file: TextIO | None = None
        if main:
            kept = [line for line in read_stats(folder) if line["step"] < first]
            with written_whole(folder / STATS) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self._file = (folder / STATS).open("a", encoding="utf-8")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def step(
        self, step: int, values: Mapping[str, float | str], *, shown: tuple[str, ...] = ("loss",)
    ) -> None:
        """Writes one line for the optimiser step ``step`` (from 0) and moves the bar.

        Args:
            step: the step that has just ended.
            values: numbers and short strings (such as whose turn it was); not-finite numbers are written as null.
            shown: the names that stand beside the bar.
        """
        if self._file is not None:
            line = {"step": step} | {name: _jsonable(value) for name, value in values.items()}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        beside = {name: values[name] for name in shown if name in values}
        self._bar.set_postfix(beside, refresh=False)
        self._bar.update(1)

    def note(self, text: str) -> None:
        """One line above the bar, on the first process only."""
        if not self._bar.disable:
            self._bar.write(text)


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's stats.jsonl, oldest first; a line that a kill cut short is left out."""
    if not (folder / STATS).is_file():
        return []
    lines = (folder / STATS).read_text(encoding="utf-8").split("\n")
    # The last piece is empty after a whole line, and half a line after a kill.
    return [json.loads(line) for line in lines[:-1]]


def _jsonable(value: float | str) -> float | str | None:
    if isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None
