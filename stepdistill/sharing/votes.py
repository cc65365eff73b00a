"""Blind votes between two pipelines: who is drawn on which side, what is kept of a vote, and what votes add up to."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Literal

from stepdistill.errors import UserError
from stepdistill.system.parsing import parse_json

Choice = Literal["left", "right", "same"]


@dataclass(frozen=True)
class Side:
    """One picture of a pair.

    Attributes:
        name: the pipeline's.
        steps: its network calls.
        seconds: that it took to draw.
    """

    name: str
    steps: int
    seconds: float


@dataclass(frozen=True)
class Vote:
    """One vote.

    Attributes:
        prompt, seed: of both pictures.
        left, right: whose they were.
        choice: the better side, or ``same``.
        seconds: between the pictures and the vote.
        written: when, with its time zone.
    """

    prompt: str
    seed: int
    left: Side
    right: Side
    choice: Choice
    seconds: float
    written: str

    @property
    def winner(self) -> str | None:
        """The name of the better one; None where neither was."""
        return {"left": self.left.name, "right": self.right.name, "same": None}[self.choice]


@dataclass(frozen=True)
class Tally:
    """The votes between two pipelines.

    Attributes:
        first, second: their names.
        first_better, second_better, same: how many votes of each kind.
    """

    first: str
    second: str
    first_better: int
    second_better: int
    same: int

    @property
    def share(self) -> float | None:
        """Of the votes for one of the two, the share for the first, in [0, 1]; None without any."""
        decided = self.first_better + self.second_better
        return self.first_better / decided if decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """Between which shares the true one is, with a probability of 0.95."""
        return binomial_interval(self.first_better, self.first_better + self.second_better)


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a binomial share (Wilson 1927, J. Am. Stat. Assoc. 22, 209): the shares p from which the
    share found is no further than z standard deviations at p. It covers at few trials, and at 0 and 1, too.

    Args:
        successes: 0 to ``trials``.
        trials: any number; of 0 the interval is [0, 1].
        level: the probability in (0, 1).
    """
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (successes + z * z / 2) / (trials + z * z)
    reach = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return (middle - reach if successes else 0.0), (middle + reach if successes < trials else 1.0)


def blind_pair(names: Sequence[str], chooser: random.Random) -> tuple[str, str]:
    """Two of the names for the left and the right, every pair and either order as likely.

    Raises:
        UserError: there are fewer than two.
    """
    if len(names) < 2:
        raise UserError("a vote needs two pipelines: give another student, or --teacher")
    left, right = chooser.sample(list(names), 2)
    return left, right


def tally(votes: Iterable[Vote], names: Sequence[str]) -> list[Tally]:
    """What the votes add up to, for every pair of names, in the names' order."""
    given, found = list(votes), []
    for first, second in combinations(names, 2):
        winners = [vote.winner for vote in given if {vote.left.name, vote.right.name} == {first, second}]
        found.append(Tally(first, second, *(winners.count(name) for name in (first, second, None))))
    return found


def append_vote(file: Path, vote: Vote) -> None:
    """Adds a vote to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(vote)) + "\n")


def read_votes(file: Path) -> list[Vote]:
    """The votes of a file of JSON lines; none where it is not there.

    Raises:
        UserError: a line is no vote.
    """
    if not file.is_file():
        return []
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            row = parse_json(line)
            found.append(Vote(**{**row, "left": Side(**row["left"]), "right": Side(**row["right"])}))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}, line {number} is not a vote: name another file with --votes, or delete that line"
            ) from None
    return found


def now() -> str:
    """The time, as a vote has it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
