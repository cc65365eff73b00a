"""What methods share that make steps fewer from stage to stage: a stage's student is the teacher of the next one.

A stage has a grid of times, evenly between those of the student; its teacher takes ``ratio`` DDIM steps where the
student learns to take one. The last stage has the student's own times, and goes on. Guidance is that of the first
teacher; all others have it in their weights.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.path import Prediction
from stepdistill.diffusion.remembered import constant
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SourceOptions, Target, examples, noised
from stepdistill.losses.contract import Method, Turn
from stepdistill.networks.sampler import Sampler

Ratios = tuple[Annotated[int, Field(ge=2)], ...]


class ProgressiveOptions(SourceOptions):
    """Options of every ProgressiveMethod."""

    ratios: Ratios = (2, 2, 2, 2)  # teacher's steps in one, by stage
    # Of the average of a stage's student that teaches the next one; 0: the student itself.
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True)
class Jump:
    """One step of the student of a stage, and the times of the teacher's within it.

    Attributes:
        start: x_t [B, ...].
        times: [B] each, descending: t, the ends of the teacher's steps, the last of which is s.
        cond: conditions.
    """

    start: Tensor
    times: tuple[Tensor, ...]
    cond: Condition

    @property
    def t(self) -> Tensor:
        """Where it starts, [B]."""
        return self.times[0]

    @property
    def s(self) -> Tensor:
        """Where it ends, [B]."""
        return self.times[-1]


class ProgressiveMethod(Method):
    """A method in such stages: everything but its loss, and when a stage ends, :meth:`stage`."""

    options: ProgressiveOptions

    def setup(self) -> None:
        if not self.options.ratios:
            raise UserError("options.ratios is empty: give a number for each stage, such as [2, 2]")
        self.average = Target(self.roles, self.options.teacher_decay)
        several = len(self.options.ratios) > 1
        self.previous = self.roles.add("previous", trained=False) if several else None

    @abstractmethod
    def stage(self, step: int) -> int:
        """The number of the stage, from 0, that the method's step is in."""

    def parts(self, stage: int) -> int:
        """How many of the stage's steps one of the last stage's becomes."""
        return prod(self.options.ratios[stage + 1 :])

    def phase(self, step: int) -> str:
        return f"{len(self.times) * self.parts(self.stage(step))} steps"

    def grid(self, parts: int) -> Sequence[float]:
        """The student's times and 0, with ``parts`` even steps, before a flow teacher's shift, from one to the next."""
        path, ends = self.student.path, [*self.times, 0.0]
        even = [path.unshifted(time) for time in ends]
        between = [path.shifted(a + (b - a) * k / parts) for a, b in pairwise(even) for k in range(1, parts)]
        return sorted({*ends, *between}, reverse=True)

    def teach(self, stage: int, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """What the stage's teacher says: the run's, guided, or the student of the stage before."""
        if stage == 0 or self.previous is None:
            return self.teacher.predict(x, t, cond, guidance=self.options.guidance)
        return self.previous.predict(x, t, cond)

    def jump(self, batch: Batch, stage: int) -> Jump:
        """A step of the stage's student from a state of its grid: clean latents, noised."""
        source, path = examples(batch, self.options.source), self.student.path
        ratio, parts = self.options.ratios[stage], self.parts(stage)
        times = constant(tuple(self.grid(parts * ratio)), batch.noise.device)
        first = ratio * batch.draws.integers("time", parts * len(self.times))
        eps = batch.draws.normal("eps", tuple(source.x0.shape[1:]))
        start = noised(path, source.x0, eps, times[first])
        return Jump(start, tuple(times[first + k] for k in range(ratio + 1)), source.cond)

    @torch.no_grad()
    def taught(self, jump: Jump, stage: int) -> Tensor:
        """x_s [B, ...], where the teacher's steps end."""
        state = jump.start
        for time, following in pairwise(jump.times):
            state = self.teach(stage, state, time, jump.cond).at(following)
        return state

    def ends_stage(self, turn: Turn) -> bool:
        """Whether another stage begins after this turn."""
        return self.stage(turn.step + 1) > self.stage(turn.step)

    def after_step(self, turn: Turn) -> None:
        if turn.network == "student":
            self.average.update()
        if self.ends_stage(turn):
            if self.options.teacher_decay:
                self.roles.become("student", "target")
            self.roles.become("previous", "student")

    def anew(self, turn: Turn) -> frozenset[str]:
        return frozenset({"student"} if self.options.teacher_decay and self.ends_stage(turn) else ())

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def sampler_at(self, step: int) -> Sampler:
        return Sampler(tuple(self.grid(self.parts(self.stage(step)))[:-1]), renoise=False)
