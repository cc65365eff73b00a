"""The section ``health`` of a recipe: what a run is watched for, and what is done about it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stepdistill.recipes.section import NotNegative, Section

SignName = Literal[
    "not_finite",
    "rate",
    "gradients",
    "loss",
    "still",
    "lag",
    "away",
    "denoising",
    "teacher",
    "collapse",
    "motion",
    "oversaturation",
    "guidance",
    "spectrum",
    "drift",
    "average",
    "data",
]
"""What a run is watched for, see stepdistill/training/signs.py."""
Action = Literal["say", "slow_down", "roll_back", "stop"]
"""What is done about it."""


class HealthOptions(Section):
    """How a run is watched, and what is done where it is found unwell. See stepdistill/training/monitor.py.

    Attributes:
        every: updates between two looks at a few samples of the student, undecoded, beside what the teacher and
            followers say of them; 0 looks never, and watches what each update tells alone.
        on_trouble: what is done: ``say`` it; ``slow_down``, the rate times ``slow_down``; ``roll_back``, to the last
            checkpoint after which a look found nothing, and slow down from there; ``stop``. Numbers that are not
            finite are no state to go on from: there the first two stop, too.
        actions: another action for a sign of its own, by name, such as ``{collapse: stop, lag: slow_down}``.
        slow_down: what the rate is multiplied by, of the network that a sign names, or else of the student.
        most: how often a run may be slowed down or rolled back; the next time it stops.
    """

    every: NotNegative = 40
    on_trouble: Action = "say"
    actions: dict[SignName, Action] = Field(default_factory=dict)
    slow_down: Annotated[float, Field(gt=0, lt=1)] = 0.5
    most: NotNegative = 3

    def action(self, sign: SignName) -> Action:
        """What is done about a sign."""
        return self.actions.get(sign, self.on_trouble)
