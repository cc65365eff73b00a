"""Watches a run: what each update tells anyway, and every ``health.every`` updates one small look (probe.py).

What is found (judging.py) is a :class:`Trouble` of one of SIGNS (signs.py); the recipe says what is done about it.
Where a sign must be found by two looks, the second comes soon after the first. All processes see the same numbers and
so do the same at the same update. What the watch knows is in every checkpoint, so that a resumed run finds what an
unbroken one would have found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.batches import Data
from stepdistill.losses.batch import Batch
from stepdistill.losses.objective import shown_name
from stepdistill.recipes.health_options import Action, HealthOptions, SignName
from stepdistill.system.parsing import parse_json
from stepdistill.training.judging import RECENT, Judge
from stepdistill.training.movement import Movement
from stepdistill.training.parallel import Parallel
from stepdistill.training.probe import Probe
from stepdistill.training.run import Run
from stepdistill.training.signs import PREFIX, SIGNS, Trouble
from stepdistill.training.unread import Row

WINDOW = 8
"""Updates before a look over which the movement of weights is taken, at most."""
AGAIN = 8
"""Updates after a look that finds something until the one that confirms it, at most."""
STRONGEST: tuple[Action, ...] = ("stop", "roll_back", "slow_down", "say")


@dataclass(frozen=True)
class Treatment:
    """What was done about troubles.

    Attributes:
        action: which it was in the end.
        sentences: what was found, and what was done.
        last_words: of a run that is to stop: one line that says what to do.
    """

    action: Action
    sentences: list[str]
    last_words: str = ""


class Monitor:
    """Watches a run.

    Args:
        run: what is watched.
        data: where conditions come from.
        options: how it is watched.
        parallel: who shares the run.
        at_once: most samples in a call of a look.

    Attributes:
        judge: what finds signs of trouble in its numbers.
        measures: how often the run was slowed down or rolled back.
        rates: what the rates of networks are multiplied by, by name.
        clean: the last update after which nothing was found; 0 before the first look.
        events: all that was found and done, oldest first.
    """

    def __init__(
        self, run: Run, data: Data, options: HealthOptions, parallel: Parallel, at_once: int
    ) -> None:
        self._run, self._data, self.options, self._parallel = run, data, options, parallel
        self._at_once = at_once
        self.movement = Movement(run, parallel)
        objective = run.objective
        self.judge = Judge(list(run.trained), objective.method.leaves_teacher, objective.judged_from)
        self.rates: dict[str, float] = {}
        self.measures, self.clean = 0, 0
        self.events: list[dict[str, Any]] = []
        self._told: list[str] = []
        self._again = 0
        self._probe: Probe | None = None
        self._loaded: dict[str, Tensor] = {}

    @property
    def probe(self) -> Probe:
        """Made for the first look."""
        if self._probe is None:
            train = self._run.options
            self._probe = Probe(self._run.objective, self._data, train.seed, train.batch, self._at_once)
            for name, value in self._loaded.items():
                setattr(self._probe, name, value.to(self._parallel.device))
            self._loaded = {}
        return self._probe

    @property
    def open(self) -> dict[str, str]:
        """What is wrong now: sentences by sign and network."""
        return self.judge.open

    def rate(self, network: str) -> float:
        """What a network's rate is multiplied by."""
        return self.rates.get(network, 1.0)

    def due(self, step: int) -> bool:
        """Whether a look follows after so many updates."""
        every = self.options.every
        return bool(every) and (step % every == 0 or step == self._again)

    def before(self, step: int) -> None:
        """Told of every update before it is made."""
        every = self.options.every
        if every and (step + min(WINDOW, every // 2)) % every == 0 and every > 1:
            self.movement.open()

    def read(self, row: Row, phase: str) -> list[Trouble]:
        """What an update tells, in order."""
        found = self.judge.of_update(row, phase)
        if found is not None and not self.options.every and not self.open:
            self.clean = row.step + 1
        return found or []

    def look(self, step: int, batch: Batch) -> tuple[dict[str, float], list[Trouble]]:
        """A look after ``step`` updates: its numbers, and what is newly wrong. Every process calls it."""
        moved = self.movement.close()
        seen = self.probe.look(batch, self._run.objective.sampler_at(step - 1))
        means = self._parallel.means(list(seen.values()))
        seen = dict(zip(seen, means, strict=True)) | moved
        seen |= self.judge.gradient_noise()
        found = self.judge.of_look(seen, step, list(self.probe.followers))
        suspected = self.judge.suspects
        self._again = step + min(AGAIN, max(1, self.options.every // 4)) if suspected else 0
        if not suspected and not self.open:
            self.clean = step
        return {PREFIX + _key(name): value for name, value in seen.items() if math.isfinite(value)}, found

    def treat(self, troubles: Sequence[Trouble], step: int) -> Treatment:
        """Does the strongest of what the recipe has for them; where the run was helped often enough, it is to stop.
        Every process calls it."""
        wanted = {self.options.action(trouble.sign) for trouble in troubles}
        action = next(each for each in STRONGEST if each in wanted)
        spent = action in ("slow_down", "roll_back") and self.measures >= self.options.most
        if action == "slow_down" and not spent:
            done = f"{self._slow_down(troubles, step)} from update {step}"
            return Treatment(action, self._noted(troubles, step, done))
        if action == "roll_back" and not spent and (said := self._roll_back(troubles, step)) is not None:
            return Treatment(action, said)
        if action == "say":
            return Treatment(action, self._noted(troubles, step, ""))
        at = self._run.healthy(self.clean)
        found = f"the last healthy checkpoint is {at}" if at else "there is no healthy checkpoint"
        why = f" after {self.measures} measures (health.most)" if spent else ""
        what = "; ".join(trouble.sentence for trouble in troubles)
        cure = SIGNS[troubles[0].sign].cure
        words = f"stopped after update {step}{why}: {what}; {found}. To do: {cure}"
        return Treatment("stop", self._noted(troubles, step, f"stopped{why}"), words)

    def not_finite(self, what: str, row: Row) -> Treatment | None:
        """Rolls back where the recipe wants it for numbers that are not finite, and can; else None, and nothing is
        done."""
        sign: SignName = "not_finite"
        trouble = Trouble(sign, SIGNS[sign].sentence(sign, 0.0, shown_name(row.network), what), row.network)
        if self.options.action(sign) != "roll_back" or self.measures >= self.options.most:
            return None
        # No look, but every number before a checkpoint was finite.
        said = self._roll_back([trouble], row.step + 1, otherwise_the_last=True)
        return None if said is None else Treatment("roll_back", said)

    def _noted(self, troubles: Sequence[Trouble], step: int, done: str) -> list[str]:
        """Remembers what was found and what was done about it; gives the sentences."""
        self.events += [{"update": step, "what": trouble.sentence, "done": done} for trouble in troubles]
        return [f"{trouble.sentence}; {done}" if done else trouble.sentence for trouble in troubles]

    def _slow_down(self, troubles: Sequence[Trouble], step: int) -> str:
        """Lowers the rates that they are about; says so. What lasts is found again when it has had time to go."""
        own = {name for name, one in self._run.objective.trained.items() if not one.follows}
        named = sorted({trouble.network for trouble in troubles if trouble.network} or own)
        for name in named:
            self.rates[name] = self.rate(name) * self.options.slow_down
        self.measures += 1
        self.judge.wait(step + 2 * max(self.options.every, RECENT))
        said = ", ".join(f"{shown_name(name)} times {self.rates[name]:g}" for name in named)
        return f"slowed down: rate of the {said}"

    def _roll_back(
        self, troubles: Sequence[Trouble], step: int, otherwise_the_last: bool = False
    ) -> list[str] | None:
        """Goes back to the last checkpoint after which a look found nothing, at lower rates, and makes it the last one
        on the disk. None where there is no such checkpoint, and nothing was done."""
        at = self._run.healthy(self.clean)
        if at is None and otherwise_the_last:
            at = self._run.healthy(step)
        if at is None:
            return None
        events, measures, rates = list(self.events), self.measures, dict(self.rates)
        run, counted = self._run, self._run.before is not None
        spent, starts = run.passes(), run.starts
        run.restore(at)
        # It is no new start, and what was spent stays spent.
        run.starts, run.before = starts, spent if counted else None
        self.events, self.measures, self.rates = events, measures, rates
        back = self._run.step
        self._told = self._noted(
            troubles, step, f"rolled back to update {back} and {self._slow_down(troubles, back)}"
        )
        self._again = 0
        self._run.save(only=True)
        return list(self._told)

    def told(self) -> list[str]:
        """Sentences of before a roll-back, for the first row after it."""
        told, self._told = self._told, []
        return told

    def state(self) -> dict[str, Tensor]:
        """All that it knows; see ``Part``."""
        known = {
            **self.judge.state(),
            "rates": self.rates,
            "measures": self.measures,
            "clean": self.clean,
            "events": self.events,
            "told": self._told,
            "again": self._again,
            "turns": self.movement.turns,
        }
        tensors = {"known": torch.tensor(list(json.dumps(known).encode()), dtype=torch.uint8)}
        if self._probe is not None:
            tensors |= {f"probe.{name}": getattr(self._probe, name) for name in _TENSORS}
        tensors |= {f"probe.{name}": value for name, value in self._loaded.items()}
        if not self._parallel.in_parts:  # of sharded weights each process has seen others
            tensors |= {f"weights.{name}": value for name, value in self.movement.kept.items()}
        return {name: value for name, value in tensors.items() if value.numel()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        known = parse_json(bytes(state["known"].tolist()).decode())
        self.judge.load(known)
        self.rates, self.events, self._again = known["rates"], known["events"], known["again"]
        self.measures, self.clean, self._told = known["measures"], known["clean"], known["told"]
        device = self._parallel.device
        self.movement.turns = known["turns"]
        self.movement.kept = {
            name.removeprefix("weights."): value.to(device)
            for name, value in state.items()
            if name.startswith("weights.")
        }
        probe = {name: state[f"probe.{name}"] for name in _TENSORS if f"probe.{name}" in state}
        self._probe, self._loaded = None, probe


_TENSORS = ("reference", "before", "towards", "known")
"""Of a probe, which a checkpoint keeps."""


def _key(name: str) -> str:
    """A number's name in stats.jsonl: networks as people know them."""
    kind, _, network = name.partition(" ")
    return f"{kind}_{shown_name(network).replace(' ', '_')}" if network else kind
