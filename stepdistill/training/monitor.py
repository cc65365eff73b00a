"""Watches a run: what each update tells anyway, and every ``health.every`` updates one small look (probe.py).

What is found is a :class:`Trouble` of one of SIGNS (signs.py), said once while it lasts; the recipe says what else is
done about it. A sign of a look that is noisy must be found by two: the second look comes soon after the first. All
processes see the same numbers and so do the same at the same update. What the watch knows is in every checkpoint, so
that a resumed run finds what an unbroken one would have found.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.batches import Data
from stepdistill.losses.batch import Batch
from stepdistill.losses.objective import shown_name
from stepdistill.recipes.health_options import Action, HealthOptions, SignName
from stepdistill.system.parsing import parse_json
from stepdistill.training.movement import Movement, names_of
from stepdistill.training.parallel import Parallel
from stepdistill.training.probe import LEVELS, Probe
from stepdistill.training.run import Run
from stepdistill.training.signs import OF_THE_TEACHERS, PREFIX, SIGNS, Trouble, growth
from stepdistill.training.unread import Row

WINDOW = 8
"""Updates before a look over which the movement of weights is taken, at most."""
AGAIN = 8
"""Updates after a look that finds something until the one that confirms it, at most."""
RECENT, LEAST, MEMORY = 8, 24, 56
"""Updates of a network whose median is set against that of those before: how many, at least how many those are, and
how many of all are remembered."""
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
        open: what is wrong now: sentences by sign and network.
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
        self.open: dict[str, str] = {}
        self.rates: dict[str, float] = {}
        self.measures, self.clean = 0, 0
        self.events: list[dict[str, Any]] = []
        self._told: list[str] = []
        self._said: set[str] = set()
        self._again = 0
        self._suspected: dict[str, int] = {}
        self._best: dict[str, float] = {}
        self._quiet = 0
        self._past: dict[str, deque[tuple[float, float]]] = {}
        self._phases: dict[str, str] = {}
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
        name = row.network
        if self._phases.get(name) != phase:
            self._past[name] = deque(maxlen=MEMORY)
            self._phases[name] = phase
        past = self._past.setdefault(name, deque(maxlen=MEMORY))
        past.append((row.numbers["loss"], row.numbers["grad_norm"]))
        found: list[Trouble] = []
        values = list(past)
        before, recent = values[:-RECENT], values[-RECENT:]
        if len(before) < LEAST:
            return []
        signs: tuple[tuple[SignName, int], ...] = (("loss", 0), ("gradients", 1))
        for sign, place in signs:
            grown = growth(*([each[place] for each in part] for part in (before, recent)))
            sentence = SIGNS[sign].sentence(sign, grown, shown_name(name))
            if self._is_new(f"{sign} {name}", grown > SIGNS[sign].bound, sentence, row.step + 1):
                found.append(Trouble(sign, sentence, name))
        if not self.options.every and not self.open:
            self.clean = row.step + 1
        return found

    def look(self, step: int, batch: Batch) -> tuple[dict[str, float], list[Trouble]]:
        """A look after ``step`` updates: its numbers, and what is newly wrong. Every process calls it."""
        moved = self.movement.close()
        seen = self.probe.look(batch, self._run.objective.sampler_at(step - 1))
        means = self._parallel.means(list(seen.values()))
        seen = dict(zip(seen, means, strict=True)) | moved
        for name, past in self._past.items():
            norms = [norm for _, norm in past]
            middle = median(norms)
            if len(norms) >= RECENT and middle > 0:
                seen[f"gradient_noise {name}"] = median(abs(norm - middle) for norm in norms) / middle
        found = self._judged(seen, step)
        suspected = any(self._suspected.values())
        self._again = (
            step + min(AGAIN, max(1, self.options.every // 4)) if suspected and found is not None else 0
        )
        if not suspected and not self.open:
            self.clean = step
        return {PREFIX + _key(name): value for name, value in seen.items() if math.isfinite(value)}, found

    def _judged(self, seen: dict[str, float], step: int) -> list[Trouble]:
        found: list[Trouble] = []
        passed_over = OF_THE_TEACHERS if self._run.objective.method.leaves_teacher else frozenset()

        def judge(
            sign: SignName, key: str, value: float, bad: bool, network: str = "", where: str = ""
        ) -> None:
            bad = bad and sign not in passed_over
            enough = bad and self._seen_often(f"{sign} {key}", SIGNS[sign].looks)
            if not bad:
                self._suspected.pop(f"{sign} {key}", None)
            sentence = SIGNS[sign].sentence(sign, value, network, where)
            if self._is_new(f"{sign} {key}", enough, sentence, step):
                found.append(Trouble(sign, sentence, network_of.get(network)))

        networks = self._run.trained
        network_of = {shown_name(name): name for name in networks}
        for name in names_of(seen):
            value = seen[f"moved {name}"]
            judge("rate", name, value, value > SIGNS["rate"].bound, shown_name(name))
            judge("still", name, value, value == 0.0, shown_name(name))
        if "average" in seen:
            judge("average", "", seen["average"], seen["average"] < SIGNS["average"].bound)
        followers = [shown_name(name) for name in self.probe.followers]
        follower = " and ".join(followers)
        if (lag := seen.get("lag")) is not None:
            judge("lag", "", lag, lag > SIGNS["lag"].bound, follower)
        for level in LEVELS:
            for key, network in (("teacher", "teacher"), ("follower", follower)):
                if (error := seen.get(f"{key}_error_{level}")) is not None:
                    judge(
                        "denoising", f"{key} {level}", error, error > SIGNS["denoising"].bound, network, level
                    )
            if (guided := seen.get(f"guided_{level}")) is not None:
                judge("guidance", level, guided, self._worse("guidance", level, guided), "", level)
        judge("teacher", "", seen["teacher_change"], seen["teacher_change"] > SIGNS["teacher"].bound)
        if (towards := seen.get("towards")) is not None:
            judge("away", "", towards, towards < SIGNS["away"].bound)
        kinds = {"prompts": "different prompts", "noises": "one prompt"}
        for key, where in kinds.items():
            if (ratio := seen.get(f"diversity_of_{key}")) is not None:
                bad = self._fallen("collapse", key, ratio)
                judge("collapse", key, ratio, bad, "", where)
        if (share := seen.get("extremes")) is not None:
            judge("oversaturation", "", share, self._worse("oversaturation", "", share))
        if (high := seen.get("high_frequencies")) is not None:
            judge("spectrum", "", high, self._parted("spectrum", "", high))
        mean, size = seen["latent_mean"], seen["latent_deviation"]
        judge("drift", "mean", mean, self._worse("drift", "mean", mean), "", "another mean than")
        judge("drift", "size", size, self._parted("drift", "size", size), "", "another deviation than")
        for key in ("images", "pairs"):
            if (apart := seen.get(f"spread_{key}")) is not None:
                judge("data", key, apart, apart < SIGNS["data"].bound, "", key)
        return found

    def _worse(self, sign: SignName, key: str, value: float) -> bool:
        """Whether a number that should be small is too large, and larger than it was."""
        return self._beyond(sign, key, value, SIGNS[sign].bound)

    def _parted(self, sign: SignName, key: str, ratio: float) -> bool:
        """The same of a ratio that should be 1. A bound below 1 is of its logarithm."""
        bound = SIGNS[sign].bound
        return self._beyond(
            sign, key, abs(math.log(max(ratio, 1e-8))), math.log(bound) if bound > 1 else bound
        )

    def _fallen(self, sign: SignName, key: str, ratio: float) -> bool:
        """Whether a ratio that should be 1 is too small, and a part of what it was."""
        return self._beyond(
            sign, key, -math.log(max(ratio, 1e-8)), -math.log(SIGNS[sign].bound), -math.log(SIGNS[sign].worse)
        )

    def _beyond(
        self, sign: SignName, key: str, value: float, bound: float, worse: float | None = None
    ) -> bool:
        name = f"{sign} {key}"
        worse = SIGNS[sign].worse if worse is None else worse
        best = self._best.get(name)
        if best is None or value < best:
            self._best[name] = max(value, 0.0) if sign == "collapse" else value
        return best is not None and value > bound and value > best + worse

    def _seen_often(self, key: str, looks: int) -> bool:
        self._suspected[key] = self._suspected.get(key, 0) + 1
        return self._suspected[key] >= looks

    def _is_new(self, key: str, bad: bool, sentence: str, step: int) -> bool:
        """Whether something is wrong that was not, at a time when measures are not still taking effect."""
        if not bad:
            self.open.pop(key, None)
            self._said.discard(key)
            return False
        self.open[key] = sentence
        new = key not in self._said and step >= self._quiet
        if new:
            self._said.add(key)
        return new

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
        self._quiet = step + 2 * max(self.options.every, RECENT)
        self.open.clear()
        self._said.clear()
        self._suspected.clear()
        self._past.clear()
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
            "open": self.open,
            "rates": self.rates,
            "measures": self.measures,
            "clean": self.clean,
            "events": self.events,
            "told": self._told,
            "said": sorted(self._said),
            "again": self._again,
            "suspected": self._suspected,
            "best": self._best,
            "quiet": self._quiet,
            "past": {name: list(past) for name, past in self._past.items()},
            "phases": self._phases,
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
        self.open, self.rates, self.events = known["open"], known["rates"], known["events"]
        self.measures, self.clean, self._told = known["measures"], known["clean"], known["told"]
        self._again, self._suspected, self._best = known["again"], known["suspected"], known["best"]
        self._quiet, self._phases, self._said = known["quiet"], known["phases"], set(known["said"])
        self._past = {
            name: deque(((loss, norm) for loss, norm in past), maxlen=MEMORY)
            for name, past in known["past"].items()
        }
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
