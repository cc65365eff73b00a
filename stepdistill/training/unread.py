"""What steps told that is still on the device: kept until it is read together, as every read waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from stepdistill.training.parallel import Parallel

GPU_STEPS = 10
"""Steps between two reads on a GPU where ``train.log_every`` is left open; on a CPU a read waits for nothing."""

READ_SECONDS = 5.0
"""No more lie between those either: several processes see a wish to stop where they read, and launchers that ask for it
kill after half a minute."""


@dataclass(frozen=True)
class Row:
    """What one step told.

    Attributes:
        step: which.
        network: whose turn it was.
        numbers: its loss, its logs and the norm of its gradient: means over the parts of its batch and over processes.
        rate: its learning rate.
        seconds: time of the run at its end, the mean over processes. It is the device's time where a step was read, and
            else that of the processor, which may be ahead.
    """

    step: int
    network: str
    numbers: dict[str, float]
    rate: float
    seconds: float


def steps_between(most: int, seconds: float) -> int:
    """Steps between two reads, where one takes so many seconds."""
    return max(1, min(most, int(READ_SECONDS / max(seconds, 1e-6))))


class Unread:
    """The steps since the last read.

    Args:
        parallel: who shares the run.
        clock: seconds of the run, now.
        every: steps between two reads, ``train.log_every``; None takes what suits the device and how long they take.
    """

    def __init__(self, parallel: Parallel, clock: Callable[[], float], every: int | None) -> None:
        self._most = GPU_STEPS if parallel.device.type == "cuda" else 1
        self.every, self._open = every or self._most, every is None
        self._read_at: float | None = None
        self._parallel, self._clock = parallel, clock
        self._waiting: list[tuple[Row, dict[str, Tensor], int]] = []

    def add(
        self, step: int, network: str, told: Sequence[Mapping[str, Tensor]], norm: Tensor, rate: float
    ) -> float:
        """Takes in a step, without a wait; gives the seconds of the run at its end.

        Args:
            step, network, rate: see :class:`Row`.
            told: scalars of each part of its batch.
            norm: of its gradient, the same in all processes.
        """
        row = Row(step, network, {}, rate, self._clock())
        sums = {key: reduce(torch.add, [part[key] for part in told]) for key in told[0]}
        self._waiting.append((row, {**sums, "grad_norm": norm}, len(told)))
        return row.seconds

    def read(self, asked: bool) -> tuple[list[Row], bool]:
        """All rows since the last read, at least one, in order, and whether any process asks to stop. Every process
        calls it, at the same step, and gets the same."""
        waiting, self._waiting = self._waiting, []
        values = [value.to(self._parallel.device) for _, sums, _ in waiting for value in sums.values()]
        read = iter(torch.stack(values).tolist())
        own = [
            next(read) / (1 if key == "grad_norm" else parts) for _, sums, parts in waiting for key in sums
        ]
        seconds = [*(row.seconds for row, _, _ in waiting[:-1]), self._clock()]
        *means, asking = self._parallel.means([*own, *seconds, float(asked)])
        number, time = iter(means[: len(own)]), iter(means[len(own) :])
        rows = [
            replace(row, numbers={key: next(number) for key in sums}, seconds=next(time))
            for row, sums, _ in waiting
        ]
        if self._open and self._read_at is not None:  # of means over processes alone, which are equal in all
            self.every = steps_between(self._most, (rows[-1].seconds - self._read_at) / len(rows))
        self._read_at = rows[-1].seconds
        return rows, asking > 0
