"""report.json: what a run, or an evaluation, says of itself, written and read by one model. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepdistill.errors import UserError

Scores = dict[str, dict[str, Any]]
"""Metric -> number of steps -> its value, None where it was not measured."""


class Measured(BaseModel):
    """What was measured, and where the numbers come from: all that runs and evaluations have in common.

    Attributes:
        name: the run's, or its folder's.
        method: its method; - of an evaluation.
        summary: the method's first line.
        pipeline: what was evaluated, of an evaluation.
        teacher_name: the teacher, as the recipe gave it.
        guidance: the teacher's guidance scale.
        suite, n: protocol and number of images; None and 0 where nothing was evaluated.
        metrics: what the distances and cosines are called in that protocol.
        better: of your own metrics, by name: which values are better.
        protocol: everything that a number depends on.
        teacher, student: scores.
        gap_closed: by number of steps, 0 the teacher with one step, 1 with all of its steps.
        recall_of_teachers: by number of steps, recall over that of the teacher with all of its steps.
        command, versions, hardware, commit: where the numbers come from.
        verification: what the proof of the student's folder said.
        updates, updates_planned: updates done, and in the recipe.
        train_seconds, peak_memory_bytes: what the training took.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    method: str = "-"
    summary: str | None = None
    pipeline: str | None = None
    teacher_name: str | None = None
    guidance: float | None = None
    suite: str | None
    n: int
    metrics: dict[str, Any] = Field(default_factory=dict)
    better: dict[str, Literal["lower", "higher"]] = Field(default_factory=dict)
    protocol: dict[str, Any] = Field(default_factory=dict)
    teacher: Scores = Field(default_factory=dict)
    student: Scores
    gap_closed: dict[str, float] = Field(default_factory=dict)
    recall_of_teachers: dict[str, float] = Field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: str | None = None
    commit: str | None = None
    verification: str | None = None
    updates: int | None = None
    updates_planned: int | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None


class RunReport(Measured):
    """What a run says of itself.

    Attributes:
        version: of this schema; ``schema`` in the file. Reports from before it was written have the same keys, or lack
            some of those that may be None or empty here.
        teacher_changes: what was changed in the teacher when it was taken.
        wall_seconds: of the whole run in the process that ended it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(1, alias="schema")
    teacher_changes: list[str] = Field(default_factory=list)
    verification: str
    train_seconds: float
    wall_seconds: float
    peak_memory_bytes: int

    def text(self) -> str:
        """The file's content."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def read_report(path: str | Path) -> Measured:
    """The report of a run folder, the report.json itself, or what ``stepdistill eval`` wrote, of a pipeline or images.

    A missing name becomes the folder's, or the file's where it is not called report.json.

    Raises:
        UserError: no report there, or not a report.
    """
    place = Path(path)
    file = place / "report.json" if place.is_dir() else place
    if not file.is_file():
        raise UserError(
            f"{path}: there is no report.json; give the folder of a finished run, or the file itself"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a report of a run: it has no suite, n, student")
    kind: type[Measured] = RunReport
    if "scores" in found:
        found, kind = _from_evaluation(found, file), Measured
    missing = [key for key in ("suite", "n", "student") if key not in found]
    if missing:
        raise UserError(f"{file}: not a report of a run: it has no {', '.join(missing)}")
    if found.get("schema", 1) != 1:
        raise UserError(
            f"{file}: a report of schema {found['schema']}, and this version reads 1: update stepdistill"
        )
    try:
        return kind.model_validate({"name": file.resolve().parent.name, **found})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: not a report of a run: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def _from_evaluation(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """What ``stepdistill eval`` wrote, in the form of a run's report."""
    scores: Scores = report["scores"]
    keys = dict.fromkeys(key for score in scores.values() for key in score)
    student = {key: {steps: score.get(key) for steps, score in scores.items()} for key in keys}
    name = file.resolve().parent.name if file.stem == "report" else file.stem
    return {"name": name, **report, "student": student}
