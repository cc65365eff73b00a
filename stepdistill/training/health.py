"""Whether a run is healthy, said while it trains: non-finite numbers, collapse, saturation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stepdistill.errors import UserError


class TrainingDiverged(UserError):
    """A loss or a gradient is not a finite number."""


def require_finite(numbers: Mapping[str, float], network: str, step: int, last_good: Path | None) -> None:
    """Stops the run when the ``loss`` or the ``grad_norm`` of a step is NaN or infinite.

    Raises:
        TrainingDiverged: naming the value, the network, the update and the last good checkpoint.
    """
    for name, value in {"loss": numbers["loss"], "gradient": numbers["grad_norm"]}.items():
        if not math.isfinite(value):
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


def verdict_of(worries: Sequence[str]) -> str:
    """``healthy``, or what such sentences are about."""
    return ", ".join(worry.partition(":")[0] for worry in worries) or "healthy"


@dataclass(frozen=True)
class Seen:
    """What a look at the student's pictures gave: numbers to log and worries to say."""

    numbers: dict[str, float]
    worries: list[str]
