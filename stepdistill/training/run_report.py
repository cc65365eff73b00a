"""report.json: what a run, or an evaluation, says of itself, written and read by one model. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from stepdistill.errors import UserError
from stepdistill.system.parsing import LARGEST, Unreadable, parse_json

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Seconds = Annotated[float, Field(ge=0, lt=1e15)]
Steps = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Number = Annotated[int, Field(gt=-LARGEST, lt=LARGEST)] | float
Scores = dict[str, dict[Steps, Number | None]]
"""Metric -> number of steps -> its value, None where it was not measured."""


class Worry(BaseModel):
    """What was out of line with the teacher's pictures, after so many updates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    update: Count
    what: str


class Health(BaseModel):
    """Whether the student's pictures are as varied and as moderate as the teacher's of the same prompts and seeds.

    Attributes:
        verdict: ``healthy``, or what the student suffers from at the end: ``collapse``, ``oversaturation``.
        sentence: the same in words.
        diversity, teacher_diversity: mean absolute difference between pictures of different prompts, in [0, 1].
        saturation, teacher_saturation: share of the values that are black or white, in [0, 1].
        x_std: standard deviation of the student's samples at its last update; None where its method does not tell.
        grad_norm: of the student at its last update, before it was clipped.
        skipped_files: images that could not be read.
        worries: what looks, previews and the end found, oldest first, and what was done about it.
        looks: numbers of the looks at the run, each with the ``update`` after which it was made; of many some.
        plateau: the update since which the student's loss no longer falls; None where it falls, or nobody can tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: str
    sentence: str
    diversity: float
    teacher_diversity: float
    saturation: float
    teacher_saturation: float
    x_std: float | None = None
    grad_norm: float | None = None
    skipped_files: Count = 0
    worries: list[Worry] = Field(default_factory=list)
    looks: list[dict[str, float]] = Field(default_factory=list)
    plateau: Count | None = None

    def line(self) -> str:
        """One line: the verdict and its numbers."""
        said = [
            f"{self.verdict}: diversity {self.diversity:.2f} (teacher {self.teacher_diversity:.2f})",
            f"saturation {self.saturation:.0%} (teacher {self.teacher_saturation:.0%})",
        ]
        if self.worries:
            said.append(f"{len(self.worries)} warning{'s' * (len(self.worries) > 1)} while it trained")
        if self.skipped_files:
            said.append(f"{self.skipped_files} file{'s' * (self.skipped_files > 1)} skipped")
        return ", ".join(said)


class Start(BaseModel):
    """A start of the run, the first or a resume.

    Attributes:
        command: what was typed.
        update: updates that were done by then.
        at: when, UTC, ISO 8601.
        hardware, commit: where it ran, and by what code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    update: Count = 0
    at: str | None = None
    hardware: str | None = None
    commit: str | None = None


class Prompts(BaseModel):
    """What the student learnt from.

    Attributes:
        file: the text file's path; None of the teacher's own, captions or class numbers.
        count: of prompts.
        sha256: of the file, or of the texts where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str | None
    count: Count
    sha256: str


class NetworkPasses(BaseModel):
    """Samples that a network was called with.

    Attributes:
        with_graph: in calls that a backward pass may follow.
        without_graph: in all others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    with_graph: Count = 0
    without_graph: Count = 0


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
        against: what the scores are measured against: ``real images`` or ``the teacher's pictures``.
        remarks: how the scores are to be read, in sentences.
        metrics: what the distances and cosines are called in that protocol.
        better: of your own metrics, by name: which values are better.
        loss_saw: the feature networks that the run's own loss looked through, and the recipe's keys that say so.
        conflicts: the scores in the eyes of one of them, and those keys: they flatter the run, and do not rank it.
        protocol: everything that a number depends on.
        teacher, student: scores.
        gap_closed: by number of steps, 0 the teacher with one step, 1 with all of its steps.
        recall_of_teachers: by number of steps, recall over that of the teacher with all of its steps.
        command, versions, hardware, commit: where the numbers come from; of a run that was resumed, the command that
            began it, and the rest of the process that ended it.
        verification: what the proof of the student's folder said.
        updates, updates_planned: updates done, and in the recipe.
        train_seconds, peak_memory_bytes: what the training took.
        passes: network passes of the training by who was called: ``teacher``, ``student`` and those that follow it;
            ``pairs`` are the teacher's for its pairs, ``start`` those that turned its output kind; both count in full
            where they were shared with other runs. Pictures that were drawn on the way do not count.
        warm_start_of: the run that made its warm start, of the same computation; passes and time count as if it had
            made its own. None where it did.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    method: str = "-"
    summary: str | None = None
    pipeline: str | None = None
    teacher_name: str | None = None
    guidance: float | None = None
    suite: str | None
    n: Count
    against: str | None = None
    remarks: list[str] = Field(default_factory=list)
    metrics: dict[str, Any] = Field(default_factory=dict)
    better: dict[str, Literal["lower", "higher", "neither"]] = Field(default_factory=dict)
    loss_saw: dict[str, str] = Field(default_factory=dict)
    conflicts: dict[str, str] = Field(default_factory=dict)
    protocol: dict[str, Any] = Field(default_factory=dict)
    teacher: Scores = Field(default_factory=dict)
    student: Scores
    gap_closed: dict[Steps, float] = Field(default_factory=dict)
    recall_of_teachers: dict[str, float] = Field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: str | None = None
    commit: str | None = None
    verification: str | None = None
    updates: Count | None = None
    updates_planned: Count | None = None
    train_seconds: Seconds | None = None
    peak_memory_bytes: Count | None = None
    passes: dict[str, NetworkPasses] = Field(default_factory=dict)
    warm_start_of: str | None = None

    @property
    def all_passes(self) -> int | None:
        """The sum of ``passes``; None where they were not counted."""
        return sum(each.with_graph + each.without_graph for each in self.passes.values()) or None


class RunReport(Measured):
    """What a run says of itself.

    Attributes:
        version: of this schema; ``schema`` in the file. Reports from before it was written have the same keys, or lack
            some of those that may be None or empty here.
        teacher_changes: what was changed in the teacher when it was taken.
        wall_seconds: of the whole run in the process that ended it.
        resumes: the later starts of the run, oldest first.
        prompts: what it learnt from; None of a teacher that draws classes.
        student_sha256: of the student's weights, however they are exported.
        health: of the student at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(1, alias="schema")
    teacher_changes: list[str] = Field(default_factory=list)
    verification: str
    train_seconds: Seconds
    wall_seconds: Seconds
    resumes: list[Start] = Field(default_factory=list)
    prompts: Prompts | None = None
    student_sha256: str | None = None
    health: Health | None = None
    peak_memory_bytes: Count

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
        found = parse_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, Unreadable) as error:
        raise UserError(f"{file}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a report of a run: it has no suite, n, student")
    kind: type[Measured] = RunReport
    if "scores" in found:
        scores = found["scores"]
        if not isinstance(scores, dict) or not all(isinstance(score, dict) for score in scores.values()):
            raise UserError(f"{file}: not a report of an evaluation: scores is no table of tables")
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
