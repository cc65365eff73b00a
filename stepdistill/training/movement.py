"""How far updates move weights: over a few updates before each look, of a part of each network's weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepdistill.training.parallel import Parallel
from stepdistill.training.run import Run

TENSORS, ELEMENTS = 32, 1 << 16
"""Of a network: tensors that are looked at, evenly spread, and numbers in all of them together, at most."""


def some_of(tensors: Sequence[Tensor]) -> Tensor:
    """Numbers [N] of some of the tensors, of a sharded one from this process's part."""
    count = min(TENSORS, len(tensors))
    chosen = [tensors[i * len(tensors) // count] for i in range(count)]
    own = (each.to_local() if isinstance(each, DTensor) else each for each in chosen)
    parts = [each.detach().flatten()[: ELEMENTS // count].float() for each in own]
    return torch.cat([part.to(parts[0].device) for part in parts]).clone()


class Movement:
    """Takes the weights of all that is trained, and the average, when it is :meth:`open`, and says how far they came.

    Attributes:
        kept: what was taken, by name; empty where nothing was.
        turns: updates of each network since.
    """

    def __init__(self, run: Run, parallel: Parallel) -> None:
        self._run, self._parallel = run, parallel
        self.kept: dict[str, Tensor] = {}
        self.turns: dict[str, int] = {}

    def _now(self) -> dict[str, Tensor]:
        run = self._run
        now = {
            name: some_of([run.weights[name].exact(each) for each in parameters])
            for name, parameters in run.trained.items()
            if parameters
        }
        if run.ema is not None:
            names = list(run.ema.shadow)
            now["average of"] = some_of(
                [run.weights[run.objective.averaged].exact(run.ema.weights[n]) for n in names]
            )
            now["average"] = some_of([run.ema.shadow[n] for n in names])
        return now

    def open(self) -> None:
        """Takes the weights as they are."""
        self.kept, self.turns = self._now(), {}

    def moved(self, network: str) -> None:
        """Told of every update."""
        if self.kept:
            self.turns[network] = self.turns.get(network, 0) + 1

    def close(self) -> dict[str, float]:
        """``moved NAME`` of each network that had an update: how far one moved it, over its weights. ``average``: the
        way of the average, over what its decay would have made of the weights' distance to it."""
        if not self.kept:
            return {}
        before, now = self.kept, self._now()
        wanted = {name: count for name, count in self.turns.items() if name in before}
        squares = [v for name in wanted for v in (_square(now[name] - before[name]), _square(before[name]))]
        averaged = self._run.objective.averaged
        with_average = self._run.ema is not None and averaged in wanted
        if with_average:
            then = before["average"].to(now["average of"].device)
            average = now["average"].to(then.device)
            squares += [_square(average - then), _square(now["average of"] - then)]
        sums = iter(self._parallel.means(squares))
        found = {}
        for name, count in wanted.items():
            way, size = next(sums), next(sums)
            found[f"moved {name}"] = (way / max(size, 1e-24)) ** 0.5 / count
        if with_average and self._run.ema is not None:
            way, distance = next(sums), next(sums)
            share = 1 - self._run.ema.present_decay ** wanted[averaged]
            if distance > 0 and share > 0:
                found["average"] = (way / distance) ** 0.5 / share
        self.kept, self.turns = {}, {}
        return found


def _square(value: Tensor) -> float:
    return float(value.square().sum())


def names_of(found: Iterable[str]) -> list[str]:
    """The networks whose movement is among the numbers."""
    return [name.removeprefix("moved ") for name in found if name.startswith("moved ")]
