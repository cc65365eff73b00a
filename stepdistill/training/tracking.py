"""Experiment trackers: what a run's page shows goes to one that accelerate knows, where the recipe asks for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import RunReport

PROJECT = "stepdistill"
_ONE_PICTURE = ("aim", "clearml")  # take a picture under a name, the others a list
_OF_PREVIEWS = ("diversity", "saturation", "teacher_diversity", "teacher_saturation")


@runtime_checkable
class TakesPictures(Protocol):
    """A tracker of accelerate's that keeps pictures; not all do."""

    name: str

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Keeps them under their names."""


def check_tracker(name: str | None) -> None:
    """The tracker is installed.

    Raises:
        UserError: it is not.
    """
    able = [str(tracker) for tracker in get_available_trackers()]
    if name is not None and name not in able:
        raise UserError(
            f"train.tracker is {name}, which is not installed or not known to accelerate; installed here: "
            f"{', '.join(able) or 'none'} (`pip install 'stepdistill[trackers]'` brings tensorboard; stats.jsonl is "
            "always written)"
        )


class Tracking:
    """What a run tells its trackers.

    Args:
        accelerator: made with ``log_with``.
        folder: of the run; trackers that write files get ``tracker/`` in it.
        recipe: the keys that are not at their defaults; of paths the last part alone is told.
    """

    def __init__(self, accelerator: Accelerator, folder: RunFolder, recipe: Mapping[str, Any]) -> None:
        self._accelerator, self._folder = accelerator, folder
        told = {key: _short(value) for key, value in recipe.items()}
        own = {"wandb": {"name": folder.root.name, "dir": str(folder.root)}}
        accelerator.init_trackers(PROJECT, config=told, init_kwargs=own)

    def row(self, update: int, values: Mapping[str, Any]) -> None:
        """A row of stats.jsonl, its losses under the network's name, and the preview that it speaks of.

        Args:
            update: from 0.
            values: the row.
        """
        network, numbers = values["network"], {}
        for key, value in values.items():
            if isinstance(value, float):
                numbers[f"{'preview' if key in _OF_PREVIEWS else network}/{key}"] = value
        self._accelerator.log(numbers, step=update)
        if "diversity" in values:
            self._picture("preview", self._folder.preview(update + 1), update)

    def end(self, report: RunReport | None) -> None:
        """The scores, the verdict and the samples; then nothing more is told. The main process has the report."""
        if report is not None:
            scores = {
                f"{who}/{key}/{steps}": float(value)
                for who, table in (("student", report.student), ("teacher", report.teacher))
                for key, by_steps in table.items()
                for steps, value in by_steps.items()
                if isinstance(value, (int, float))
            }
            gaps = {f"gap_closed/{steps}": gap for steps, gap in report.gap_closed.items()}
            last = report.updates or 0
            self._accelerator.log({**scores, **gaps, "verification": report.verification}, step=last)
            self._picture("samples", self._folder.samples, last)
        self._accelerator.end_training()

    def _picture(self, name: str, file: Path, update: int) -> None:
        if not file.is_file():
            return
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        for tracker in self._accelerator.trackers:
            if not isinstance(tracker, TakesPictures):
                continue
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=update, dataformats="NHWC")
            else:
                tracker.log_images(
                    {name: picture if tracker.name in _ONE_PICTURE else [picture]}, step=update
                )


def _short(value: Any) -> str | int | float | bool:
    """A value as every tracker takes it; of a path on this machine its name."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return Path(value).name if Path(value).exists() else value
    return json.dumps(value)
