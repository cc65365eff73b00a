"""Whether a run is healthy, said while it trains: non-finite numbers, collapse, saturation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.errors import TrainingDiverged
from stepdistill.training.run_report import Health, Worry
from stepdistill.training.signs import PREFIX, plateau


def not_finite(numbers: Mapping[str, float]) -> str | None:
    """Which of the ``loss`` and the ``gradient`` of a step is NaN or infinite, the first one; None where none is."""
    named = {"loss": numbers["loss"], "gradient": numbers["grad_norm"]}
    return next((name for name, value in named.items() if not math.isfinite(value)), None)


def require_finite(numbers: Mapping[str, float], network: str, step: int, last_good: Path | None) -> None:
    """Stops the run when the ``loss`` or the ``grad_norm`` of a step is NaN or infinite.

    Raises:
        TrainingDiverged: naming the value, the network, the update and the last good checkpoint.
    """
    if (name := not_finite(numbers)) is not None:
        value = numbers["loss" if name == "loss" else "grad_norm"]
        resume = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"the {name} of {network} is {value} at update {step}; {resume}. Lower train.lr or train.clip, or set "
            "train.precision=float32"
        )


@dataclass(frozen=True)
class Vitals:
    """What a preview says about the student, for the same prompts and noises each time.

    Attributes:
        diversity: mean absolute pixel difference between pictures of different prompts, in [0, 1].
        saturation: share of channel values within 1/255 of black or white.
    """

    diversity: float
    saturation: float

    @staticmethod
    def of(images: Tensor) -> Vitals:
        """Of images [B, 3, H, W] in [0, 1], B > 1."""
        difference = (images - images.roll(1, 0)).abs().mean()
        extreme = ((images < 1 / 255) | (images > 254 / 255)).float().mean()
        return Vitals(float(difference), float(extreme))

    def worries(self, reference: Vitals) -> list[str]:
        """What is out of line with the teacher's own pictures of the same prompts, one sentence each."""
        found = []
        if self.diversity < 0.5 * reference.diversity:
            found.append(
                f"collapse: pictures differ by {self.diversity:.3f}, the teacher's by {reference.diversity:.3f}"
            )
        if self.saturation > 0.15 + 1.5 * reference.saturation:
            found.append(
                f"oversaturation: {self.saturation:.0%} of the values are black or white, "
                f"{reference.saturation:.0%} in the teacher's"
            )
        return found


def verdict_of(worries: Iterable[str]) -> str:
    """``healthy``, or what such sentences are about, each once."""
    return ", ".join(dict.fromkeys(worry.partition(":")[0] for worry in worries)) or "healthy"


def health_of(
    rows: Sequence[Mapping[str, Any]],
    update: int,
    drawn: Vitals,
    teacher: Vitals,
    skipped: int = 0,
    lasting: Sequence[str] = (),
) -> Health:
    """Of a student at the end of its run.

    Args:
        rows: of stats.jsonl.
        update: updates done.
        drawn, teacher: of pictures of the same prompts and seeds.
        skipped: images that could not be read.
        lasting: what the looks at it found wrong, and was so at the end.
    """
    last: Mapping[str, Any] = next((row for row in reversed(rows) if row["network"] == "student"), {})
    now = drawn.worries(teacher)
    now += [what for what in lasting if verdict_of([what]) not in map(_kind, now)]
    found = [(row["update"] + 1, what) for row in rows for what in row.get("worries", ())]
    found += [(update, what) for what in now if (update, verdict_of([what])) not in _kinds(found)]
    healthy = "The student's pictures differ from each other about as much as the teacher's, and are no more saturated"
    before = f"; there was {verdict_of([found[-1][1]])} at update {found[-1][0]}" if found else ""
    return Health(
        verdict=verdict_of(now),
        sentence="; ".join(now) or f"{healthy}{before}.",
        diversity=drawn.diversity,
        teacher_diversity=teacher.diversity,
        saturation=drawn.saturation,
        teacher_saturation=teacher.saturation,
        x_std=last.get("x_std"),
        grad_norm=last.get("grad_norm"),
        skipped_files=skipped,
        worries=[Worry(update=at, what=what) for at, what in found],
        looks=looks_of(rows),
        plateau=plateau(rows),
    )


LOOKS = 48
"""Of a run that report.json keeps, at most, evenly spread, the last one among them."""


def looks_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The numbers of a run's looks, each with the ``update`` after which it was made."""
    looked = [row for row in rows if any(key.startswith(PREFIX) for key in row)]
    every = -(-len(looked) // LOOKS) or 1
    return [
        {"update": row["update"] + 1}
        | {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}
        for row in looked[::-1][::every][::-1]
    ]


def _kind(worry: str) -> str:
    return worry.partition(":")[0]


def _kinds(found: Sequence[tuple[int, str]]) -> set[tuple[int, str]]:
    return {(at, verdict_of([what])) for at, what in found}


@dataclass(frozen=True)
class Seen:
    """What a look at the student's pictures gave: numbers to log and worries to say."""

    numbers: dict[str, float]
    worries: list[str]
