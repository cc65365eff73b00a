"""What is found in a run's numbers: which signs of trouble are there, of those that an update tells and of a look's.

A sign of a look that is noisy must be found by two. What is found is said once while it lasts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from stepdistill.losses.objective import shown_name
from stepdistill.recipes.health_options import SignName
from stepdistill.training.movement import names_of
from stepdistill.training.probe import LEVELS
from stepdistill.training.signs import OF_THE_TEACHERS, SIGNS, Trouble, growth
from stepdistill.training.unread import Row

RECENT, LEAST, MEMORY = 8, 24, 56
"""Updates of a network whose median is set against that of those before: how many, at least how many those are, and
how many of all are remembered."""


class Judge:
    """Finds signs of trouble in numbers, and remembers which.

    Args:
        networks: what is trained, by its names in ``trained``.
        leaves_teacher: whether the student is led to other samples than the teacher's.
        judged_from: updates before which its samples say nothing yet.

    Attributes:
        open: what is wrong now: sentences by sign and network.
        quiet: the update until which nothing is new: measures are still taking effect.
    """

    def __init__(self, networks: Sequence[str], leaves_teacher: bool = False, judged_from: int = 0) -> None:
        self._networks, self._judged_from = tuple(networks), judged_from
        self._passed_over: frozenset[SignName] = OF_THE_TEACHERS if leaves_teacher else frozenset()
        self.open: dict[str, str] = {}
        self.quiet = 0
        self._said: set[str] = set()
        self._suspected: dict[str, int] = {}
        self._best: dict[str, float] = {}
        self._past: dict[str, deque[tuple[float, float]]] = {}
        self._phases: dict[str, str] = {}

    @property
    def suspects(self) -> bool:
        """Whether something was found that another look must find, too."""
        return any(self._suspected.values())

    def of_update(self, row: Row, phase: str) -> list[Trouble] | None:
        """What is newly wrong by an update's numbers; None before there are enough of its network to tell."""
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
            return None
        signs: tuple[tuple[SignName, int], ...] = (("loss", 0), ("gradients", 1))
        for sign, place in signs:
            grown = growth(*([each[place] for each in part] for part in (before, recent)))
            sentence = SIGNS[sign].sentence(sign, grown, shown_name(name))
            if self._is_new(f"{sign} {name}", grown > SIGNS[sign].bound, sentence, row.step + 1):
                found.append(Trouble(sign, sentence, name))
        return found

    def gradient_noise(self) -> dict[str, float]:
        """How much the size of each network's gradient varies: the median deviation from the median, over that."""
        found = {}
        for name, past in self._past.items():
            norms = [norm for _, norm in past]
            middle = median(norms)
            if len(norms) >= RECENT and middle > 0:
                found[f"gradient_noise {name}"] = median(abs(norm - middle) for norm in norms) / middle
        return found

    def of_look(self, seen: dict[str, float], step: int, followers: Sequence[str]) -> list[Trouble]:
        """What is newly wrong by a look's numbers.

        Args:
            seen: them.
            step: updates done.
            followers: names of the networks that follow the student's samples.
        """
        found: list[Trouble] = []

        def judge(
            sign: SignName, key: str, value: float, bad: bool, network: str = "", where: str = ""
        ) -> None:
            bad = bad and sign not in self._passed_over
            enough = bad and self._seen_often(f"{sign} {key}", SIGNS[sign].looks)
            if not bad:
                self._suspected.pop(f"{sign} {key}", None)
            sentence = SIGNS[sign].sentence(sign, value, network, where)
            if self._is_new(f"{sign} {key}", enough, sentence, step):
                found.append(Trouble(sign, sentence, network_of.get(network)))

        network_of = {shown_name(name): name for name in self._networks}
        for name in names_of(seen):
            value = seen[f"moved {name}"]
            judge("rate", name, value, value > SIGNS["rate"].bound, shown_name(name))
            judge("still", name, value, value == 0.0, shown_name(name))
        if "average" in seen:
            judge("average", "", seen["average"], seen["average"] < SIGNS["average"].bound)
        follower = " and ".join(shown_name(name) for name in followers)
        if (lag := seen.get("lag")) is not None:
            judge("lag", "", lag, lag > SIGNS["lag"].bound, follower)
        for level in LEVELS:
            for key, network in (("teacher", "teacher"), ("follower", follower)):
                if key == "follower" and step < self._judged_from:
                    continue  # it is asked of samples that say nothing yet
                if (error := seen.get(f"{key}_error_{level}")) is not None:
                    judge(
                        "denoising", f"{key} {level}", error, error > SIGNS["denoising"].bound, network, level
                    )
            if (guided := seen.get(f"guided_{level}")) is not None:
                judge("guidance", level, guided, self._worse("guidance", level, guided), "", level)
        judge("teacher", "", seen["teacher_change"], seen["teacher_change"] > SIGNS["teacher"].bound)
        for key in ("images", "pairs"):
            if (apart := seen.get(f"spread_{key}")) is not None:
                judge("data", key, apart, apart < SIGNS["data"].bound, "", key)
        if step < self._judged_from:
            return found
        if (towards := seen.get("towards")) is not None:
            judge("away", "", towards, towards < SIGNS["away"].bound)
        kinds = {"prompts": "different prompts", "noises": "one prompt"}
        for key, where in kinds.items():
            if (ratio := seen.get(f"diversity_of_{key}")) is not None:
                bad = self._fallen("collapse", key, ratio)
                judge("collapse", key, ratio, bad, "", where)
        if (moving := seen.get("motion")) is not None:
            judge("motion", "", moving, self._fallen("motion", "", moving))
        if (share := seen.get("extremes")) is not None:
            judge("oversaturation", "", share, self._worse("oversaturation", "", share))
        if (high := seen.get("high_frequencies")) is not None:
            judge("spectrum", "", high, self._parted("spectrum", "", high))
        mean, size = seen["latent_mean"], seen["latent_deviation"]
        judge("drift", "mean", mean, self._worse("drift", "mean", mean), "", "another mean than")
        judge("drift", "size", size, self._parted("drift", "size", size), "", "another deviation than")
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
        fallen = -math.log(min(max(ratio, 1e-8), 1.0))  # what was above 1 has not fallen at 1
        return self._beyond(sign, key, fallen, -math.log(SIGNS[sign].bound), -math.log(SIGNS[sign].worse))

    def _beyond(
        self, sign: SignName, key: str, value: float, bound: float, worse: float | None = None
    ) -> bool:
        name = f"{sign} {key}"
        worse = SIGNS[sign].worse if worse is None else worse
        best = self._best.get(name)
        if best is None or value < best:
            self._best[name] = value
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
        new = key not in self._said and step >= self.quiet
        if new:
            self._said.add(key)
        return new

    def wait(self, until: int) -> None:
        """Forgets what was found: measures were taken, and what lasts is found again when they have had time."""
        self.quiet = until
        self.open.clear()
        self._said.clear()
        self._suspected.clear()
        self._past.clear()

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON has it."""
        return {
            "open": self.open,
            "said": sorted(self._said),
            "suspected": self._suspected,
            "best": self._best,
            "quiet": self.quiet,
            "past": {name: list(past) for name, past in self._past.items()},
            "phases": self._phases,
        }

    def load(self, known: dict[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.open, self._suspected, self._best = known["open"], known["suspected"], known["best"]
        self.quiet, self._phases, self._said = known["quiet"], known["phases"], set(known["said"])
        self._past = {
            name: deque(((loss, norm) for loss, norm in past), maxlen=MEMORY)
            for name, past in known["past"].items()
        }
