"""Faults that are put into a run while it trains, and what the run's watch makes of them."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from stepdistill.data.batches import Data
from stepdistill.errors import TrainingDiverged, Unhealthy
from stepdistill.losses.contract import Turn
from stepdistill.networks.averages import Ema
from stepdistill.networks.denoiser import Denoiser
from stepdistill.recipes.recipe import Recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.monitor import Monitor, Treatment
from stepdistill.training.training_data import training_data


@dataclass
class Under:
    """A run that a fault is put into.

    Attributes:
        job: its networks.
        data: its batches.
        undo: what the fault must take back at the end.
    """

    job: Assembled
    data: Data
    undo: contextlib.ExitStack

    def set(self, thing: object, name: str, value: object) -> None:
        """Sets an attribute until the end."""
        self.undo.enter_context(patch.object(thing, name, value))

    def batches(self, change: Callable[[Any], Any]) -> None:
        """Changes the examples of every batch from here on."""
        plain = self.data.batch
        self.set(self.data, "batch", lambda *which: change(plain(*which)))


def _rates(under: Under, factor: float, follows: bool) -> None:
    objective = under.job.objective
    plain = objective.lr_ratio

    def ratio(turn: Turn) -> float:
        return plain(turn) * (factor if objective.trained[turn.network].follows == follows else 1.0)

    under.set(objective, "lr_ratio", ratio)


def rate(under: Under) -> None:
    """The student's rate is 3000 times what it was: 0.03."""
    _rates(under, 3000.0, follows=False)


def frozen_follower(under: Under) -> None:
    """The follower's rate is 0."""
    _rates(under, 0.0, follows=True)


def wrong_sign(under: Under) -> None:
    """The loss of a student's sample has the other sign."""
    method: Any = under.job.method
    plain = method.match

    def turned(x: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, logs = plain(x, batch)
        return -loss, logs

    under.set(method, "match", turned)


def _clock(under: Under, network: Denoiser, factor: float) -> None:
    plain = network._called
    under.set(network, "_called", lambda x_t, time, cond: plain(x_t, time * factor, cond))


def follower_time(under: Under) -> None:
    """The follower is told t in [0, 1] and not its timesteps."""
    _clock(under, under.job.method.roles["fake"], 1e-3)


def teacher_time(under: Under) -> None:
    """The teacher is told t in [0, 1] and not its timesteps."""
    _clock(under, under.job.method.teacher.denoiser, 1e-3)


def student_time(under: Under) -> None:
    """The student is told t in [0, 1] and not its timesteps."""
    _clock(under, under.job.student, 1e-3)


def collapsed_prompts(under: Under) -> None:
    """The student sees the same prompt for all samples."""
    student = under.job.student
    plain = student._called

    def one(x_t: torch.Tensor, time: torch.Tensor, cond: Any) -> torch.Tensor:
        return plain(x_t, time, cond.rows(torch.zeros(len(x_t), dtype=torch.int64)))

    under.set(student, "_called", one)


def guidance(under: Under) -> None:
    """The guidance of the real score is 15."""
    method = under.job.method
    under.set(method, "options", method.options.model_copy(update={"score_guidance": 15.0}))


def nan_sample(under: Under) -> None:
    """The noise of one sample of each batch is not a number."""

    def poisoned(batch: Any) -> Any:
        noise = batch.noise.clone()
        noise[0] = math.nan
        batch.__dict__["noise"] = noise
        return batch

    under.batches(poisoned)


def stale_average(under: Under) -> None:
    """The average is no longer updated."""
    under.set(Ema, "update", lambda self: None)


def one_image(under: Under) -> None:
    """All pairs are one."""

    def same(batch: Any) -> Any:
        pairs = batch.pairs
        return replace(batch, pairs=replace(pairs, x0=pairs.x0[:1].expand_as(pairs.x0).clone()))

    under.batches(same)


FAULTS: dict[str, Callable[[Under], None]] = {
    "too high rate": rate,
    "frozen follower": frozen_follower,
    "wrong sign": wrong_sign,
    "wrong time scale, follower": follower_time,
    "wrong time scale, teacher": teacher_time,
    "wrong time scale, student": student_time,
    "collapsed prompts": collapsed_prompts,
    "oversaturating guidance": guidance,
    "NaN in one sample": nan_sample,
    "stale average": stale_average,
    "data of one image": one_image,
}


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        treatments: update, signs and what was done, in order.
        ended: what it ended with; None where all updates were done.
        looks: the numbers of its looks by update.
    """

    treatments: list[tuple[int, list[str], Treatment]]
    ended: str | None
    looks: dict[int, dict[str, float]]

    @property
    def recognised(self) -> int | None:
        """The update after which something was found."""
        if self.treatments:
            return self.treatments[0][0]
        found = re.search(r"at update (\d+)", self.ended or "")
        return int(found[1]) + 1 if found else None

    @property
    def signs(self) -> list[str]:
        """The first signs."""
        return self.treatments[0][1] if self.treatments else ["not_finite"] if self.ended else []


@contextlib.contextmanager
def _overheard(outcome: Outcome) -> Iterator[None]:
    treat, look, plain = Monitor.treat, Monitor.look, Monitor.not_finite

    def treated(self: Monitor, troubles: Any, step: int) -> Treatment:
        done = treat(self, troubles, step)
        outcome.treatments.append((step, [trouble.sign for trouble in troubles], done))
        return done

    def looked(self: Monitor, step: int, batch: Any) -> Any:
        numbers, found = look(self, step, batch)
        outcome.looks[step] = numbers
        return numbers, found

    def lost(self: Monitor, what: str, row: Any) -> Treatment | None:
        done = plain(self, what, row)
        if done is not None:
            outcome.treatments.append((row.step + 1, ["not_finite"], done))
        return done

    with (
        patch.object(Monitor, "treat", treated),
        patch.object(Monitor, "look", looked),
        patch.object(Monitor, "not_finite", lost),
    ):
        yield


def run_with(
    recipe: Recipe,
    folder: Path,
    fault: Callable[[Under], None] | None = None,
    onset: int = 0,
    resume: Path | None = None,
) -> Outcome:
    """Trains a recipe, with a fault from an update on.

    Args:
        recipe: what to train.
        folder: of the run.
        fault: what goes wrong.
        onset: from the update after so many on.
        resume: the folder of a run that it goes on with, which is copied.
    """
    if resume is not None:
        shutil.copytree(resume, folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator, outcome = Accelerator(cpu=True), Outcome([], None, {})
    job = assemble(resolve(recipe), accelerator)
    data = training_data(job, folder)
    with contextlib.ExitStack() as undo, _overheard(outcome):
        plain, begun = job.objective.turn, list[int]()

        def turn(step: int) -> Turn:
            if fault is not None and step >= onset and not begun:
                begun.append(step)
                fault(Under(job, data, undo))
            return plain(step)

        undo.enter_context(patch.object(job.objective, "turn", turn))
        try:
            train(job.objective, data, recipe, folder, accelerator, resume=resume is not None)
        except (Unhealthy, TrainingDiverged) as error:
            outcome.ended = str(error)
    return outcome
