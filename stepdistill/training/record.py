"""What a run leaves of itself however it ends: its log, and in status.json why it stopped."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepdistill.errors import TrainingDiverged, UserError, first_line
from stepdistill.system.log import stderr_kept
from stepdistill.system.run_folder import RunFolder, RunStatus, removed_if_empty


@contextmanager
def recorded(folder: Path, status: RunStatus, command: str) -> Iterator[None]:
    """Around all of a run: makes its folder, keeps what is said in log.txt, and says at the end what it came to.

    Args:
        folder: of the run.
        status: of the run.
        command: what started it.
    """
    place = RunFolder(folder)
    with removed_if_empty(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with stderr_kept(place.log, command) as log:
            status.tell("preparing", "starting")
            try:
                yield
            except KeyboardInterrupt:
                status.tell("stopped", "it was asked to stop")
                raise
            except UserError as error:
                log(f"error: {error}")
                diverged = "diverged" if isinstance(error, TrainingDiverged) else None
                status.tell("stopped", " ".join(str(error).split()), health=diverged)
                raise
            except BaseException as error:
                log(traceback.format_exc())
                status.tell("stopped", first_line(error))
                raise
        status.tell("done", "done")
