"""What a run leaves of itself however it ends: its log, and in status.json why it stopped."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stepdistill.errors import TrainingDiverged, UserError, first_line
from stepdistill.system.log import stderr_kept
from stepdistill.system.run_folder import RunFolder, RunStatus, held


@contextmanager
def recorded(folder: Path, status: RunStatus, command: str) -> Iterator[None]:
    """Around all of a run: makes its folder, keeps what is said in log.txt, and says at the end what it came to.

    Args:
        folder: of the run.
        status: of the run.
        command: what started it.
    """
    place = RunFolder(folder)
    with held(folder):
        with stderr_kept(place.log, command) as log:
            status.tell("preparing", "starting")
            try:
                yield
            except BaseException as error:
                with suppress(OSError):  # a full disk says of itself, not of what is written about it
                    _tell_end(error, status, log)
                raise
        status.tell("done", "done")


def _tell_end(error: BaseException, status: RunStatus, log: Callable[[str], object]) -> None:
    if isinstance(error, KeyboardInterrupt):
        status.tell("stopped", "it was asked to stop")
    elif isinstance(error, UserError):
        log(f"error: {error}")
        diverged = "diverged" if isinstance(error, TrainingDiverged) else None
        status.tell("stopped", " ".join(str(error).split()), health=diverged)
    else:
        log(traceback.format_exc())
        status.tell("stopped", first_line(error))
