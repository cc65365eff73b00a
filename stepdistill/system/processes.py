"""The processes that share one piece of work, as ``accelerate launch`` starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stepdistill.errors import OtherProcessError, UserError

if TYPE_CHECKING:
    import torch


PATIENCE = timedelta(days=1)
"""How long a process waits for the others. Ten minutes, the default on GPUs, are less than one of them takes alone for
pictures of a large teacher, a checkpoint or the report; a process that dies ends the others by the launcher anyway."""

T = TypeVar("T")
FAILED = ".failed"
"""A file in the common folder that says that a process has failed, and with what."""


@dataclass(frozen=True)
class Processes:
    """One process and how many there are.

    Attributes:
        rank: its number, from 0.
        count: of all.
        device: its own; None leaves the choice.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        """Whether it is the one that measures, writes and shows."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them; waits for them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def together(self, work: Callable[[], T]) -> T:
        """Do the same in every process, for work that takes all of them about as long. Where it fails in one, all end.

        Raises:
            OtherProcessError: it failed in another one, which raises what it is.
        """
        error: Exception | None = None
        try:
            done = work()
        except Exception as raised:
            error = raised
        told = self.gather(None if error is None else str(error))
        first = next((rank for rank, text in enumerate(told) if text is not None), None)
        if first is None:
            return done
        if error is not None and first == self.rank:
            raise error
        raise OtherProcessError(f"process {first} ended: {told[first]}") from error

    @contextmanager
    def sharing(self, folder: Path) -> Iterator[None]:
        """Around work of which each process does its own part: the first that fails leaves word in the folder."""
        try:
            yield
        except OtherProcessError:
            raise
        except Exception as error:
            if self.count > 1:
                self._tell(folder, error)
            raise

    def go_on(self, folder: Path) -> None:
        """Nothing, as long as no process has failed.

        Raises:
            OtherProcessError: one has.
        """
        if self.count == 1:
            return
        if (folder / FAILED).exists():
            raise OtherProcessError((folder / FAILED).read_text("utf-8"))
        if not folder.exists():  # a temporary one goes with the main process
            raise OtherProcessError("another process ended")

    def wait_until(self, there: Callable[[], bool], folder: Path) -> None:
        """Waits for the others' work, for any time (a barrier of the process group would give up).

        Raises:
            OtherProcessError: one has failed.
        """
        while not there():
            self.go_on(folder)
            time.sleep(0.05)

    def part(self) -> None:
        """Ends the process group, when all work is done."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def _tell(self, folder: Path, error: Exception) -> None:
        text = f"process {self.rank} ended: {error}"
        try:
            with (folder / FAILED).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise OtherProcessError((folder / FAILED).read_text("utf-8")) from error
        except OSError:  # a temporary folder goes with the main process
            if not folder.exists():
                raise OtherProcessError("another process ended") from error


ALONE = Processes()


def told() -> Processes:
    """The processes as the launcher says them: nothing is started and no device chosen, and torch is not imported."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def launched() -> Processes:
    """The processes of ``accelerate launch`` or torchrun; ALONE where there are none.

    Raises:
        UserError: they cannot talk to each other.
    """
    wanted = told().count
    if wanted == 1:
        return ALONE
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != wanted:
        raise UserError(f"{wanted} processes were launched, but accelerate runs {state.num_processes}")
    return Processes(state.process_index, state.num_processes, state.device)
