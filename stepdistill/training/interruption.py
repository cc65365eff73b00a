"""Ctrl-C, and the signals with which schedulers take a machine back, end a run after the step under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

REQUEUE = 75
"""Exit status of a run that a scheduler's signal has ended: sysexits.h calls it a temporary failure, to be tried
again."""

SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
"""Kubernetes and Slurm's scancel send the first, ``sbatch --signal=USR1@SECONDS`` the second."""


class Preempted(KeyboardInterrupt):
    """A run was ended by a scheduler's signal; with --resume it goes on."""


@contextmanager
def preemptible() -> Iterator[None]:
    """Inside it a scheduler's signal ends what is under way as Ctrl-C does, with :class:`Preempted`."""

    def end(number: int, frame: object) -> None:
        raise Preempted

    with _handled(dict.fromkeys(SCHEDULERS, end)):
        yield


class Interruption:
    """Within it Ctrl-C and schedulers' signals only ask: the step under way ends, so that what is saved is whole. A
    second Ctrl-C interrupts at once.

    Attributes:
        asked: whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._by_hand = False
        self._handled = _handled(dict.fromkeys((signal.SIGINT, *SCHEDULERS), self._ask))

    def __enter__(self) -> Interruption:
        self._handled.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._handled.__exit__(*error)

    def ended(self) -> KeyboardInterrupt:
        """What the run ends with; where another process was asked, as by a scheduler."""
        return KeyboardInterrupt() if self._by_hand else Preempted()

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        self._by_hand = self._by_hand or number == signal.SIGINT


@contextmanager
def _handled(handlers: Mapping[int, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
