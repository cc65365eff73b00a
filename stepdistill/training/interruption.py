"""Ctrl-C and SIGTERM end a run after the step under way."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interruption:
    """Within it, Ctrl-C and SIGTERM only ask: the step under way ends, so that what is saved is whole. A second one
    interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
