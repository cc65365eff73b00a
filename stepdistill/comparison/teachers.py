"""The teachers of a group of runs, each with its own scores. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.training.run_report import Measured


@dataclass(frozen=True)
class Teacher:
    """One teacher at one guidance, as the reports of its students have it.

    Attributes:
        name: as their recipes gave it; None where the reports do not say.
        guidance: its scale; None where they do not say.
        scores: by metric and step count.
    """

    name: str | None
    guidance: float | None
    scores: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        """``teacher emoji, guidance 2.5``, without what is not known."""
        name = "teacher" if self.name is None else f"teacher {self.name}"
        return name if self.guidance is None else f"{name}, guidance {self.guidance:g}"


def teachers(reports: Sequence[Measured]) -> list[Teacher]:
    """The teachers that have scores, in the order of the reports. Reports of one teacher and guidance complete each
    other; of a score that two state the first is taken."""
    found: dict[tuple[str | None, float | None], Teacher] = {}
    for report in reports:
        if not any(report.teacher.values()):
            continue
        key = (report.teacher_name, report.guidance)
        own = found.setdefault(key, Teacher(*key, {})).scores
        for metric, scores in report.teacher.items():
            own[metric] = {**scores, **own.get(metric, {})}
    return list(found.values())
