"""What trackers are told: the numbers and pictures of the run's page, through accelerate's own interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from run_folders import REPORT, rows, write_run

from stepdistill.errors import UserError
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import RunReport
from stepdistill.training.tracking import Tracking, check_tracker


class Kept(GeneralTracker):
    """A tracker of one's own, as accelerate's documents have it; it keeps what it is told."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.numbers: list[tuple[int | None, dict[str, Any]]] = []
        self.ended = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.numbers.append((step, values))

    def finish(self) -> None:
        self.ended = True


class KeptWithPictures(Kept):
    """One that takes pictures, too."""

    name = "kept with pictures"

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[int | None, str, tuple[int, int]]] = []

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.pictures += [(step, name, image.size) for name, images in values.items() for image in images]


def test_trackers_get_the_numbers_and_pictures_of_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", report=True)
    plain, other = Kept(), KeptWithPictures()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    recipe = {"method": "dmd", "data.prompts": str(prompts), "train.lr": 0.5, "train.betas": [0.9, 0.99]}
    tracking = Tracking(Accelerator(cpu=True, log_with=[plain, other]), RunFolder(run), recipe)
    for row in rows():
        tracking.row(row["update"], row)
    tracking.end(RunReport.model_validate({**REPORT, "name": "run"}))
    # Nothing of this machine's folders is told.
    config = {"method": "dmd", "data.prompts": "prompts.txt", "train.lr": 0.5, "train.betas": "[0.9, 0.99]"}
    assert plain.config == other.config == config and plain.ended and plain.numbers == other.numbers
    assert [step for step, _ in plain.numbers] == [*range(12), 12]
    numbers = {"student/loss": 0.7, "student/grad_norm": 4.0, "student/lr": 1e-4, "student/field": 0.5}
    preview = {"diversity": 0.25, "teacher_diversity": 0.3, "saturation": 0.1, "teacher_saturation": 0.2}
    preview = {f"preview/{key}": value for key, value in preview.items()}
    assert plain.numbers[3][1] == pytest.approx({**numbers, "student/seconds": 2.0, **preview})
    assert "fake score/loss" in plain.numbers[4][1]
    last = plain.numbers[-1][1]
    assert (last["gap_closed/1"], last["student/fd/1"], last["teacher/fd/25"]) == (0.75, 2.0, 1.0)
    assert [(step, name) for step, name, _ in other.pictures] == [
        *((update, "preview") for update in (3, 7, 11)),
        (12, "samples"),
    ]
    assert other.pictures[-1][2] == (2 * 66 + 2, 3 * 82 + 2)


def test_a_process_without_the_report_ends_its_trackers(tmp_path: Path) -> None:
    kept = Kept()
    tracking = Tracking(Accelerator(cpu=True, log_with=[kept]), RunFolder(tmp_path), {})
    tracking.end(None)
    assert kept.ended and kept.numbers == []


def test_tensorboard_reads_what_it_was_told(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )
    run = write_run(tmp_path / "run", report=True)
    check_tracker("tensorboard")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(run / "tracker"))
    tracking = Tracking(accelerator, RunFolder(run), {"train.lr": 0.5})
    for row in rows():
        tracking.row(row["update"], row)
    tracking.end(None)
    read = events.EventAccumulator(str(run / "tracker" / "stepdistill"))
    read.Reload()
    told = [row for row in rows() if row["network"] == "student"]
    losses = read.Scalars("student/loss")
    assert [event.step for event in losses] == [row["update"] for row in told]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in told])
    assert [event.step for event in read.Images("preview")] == [3, 7, 11]


def test_a_tracker_that_is_not_there_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"train.tracker is nosuch, which is not installed .*stepdistill\[trackers\]"
    ):
        check_tracker("nosuch")
    check_tracker(None)
