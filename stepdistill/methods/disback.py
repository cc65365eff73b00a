"""DisBack: DMD towards networks that were led from the teacher to the student, walked backwards to the teacher.

Zhang et al. 2024, "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
2408.15991.

- At its start a student's samples are where the teacher's score was never trained. So first the fake network learns
  them, the student resting, and on the way leaves copies of itself, psi_1 .. psi_N-1: from the teacher, psi_0, to the
  student's own score, psi_N, which is what the fake network then is (degradation recording).
- Then DMD's updates with psi_N-1 as the real score, then psi_N-2, ... and at last the teacher for good (backtracking).
- ``fake_warm_start`` is the length of the first stage, ``waypoints`` is N, ``interval`` the student's updates for each
  of psi_N-1 .. psi_1. With one waypoint the method is DMD.
- Copies are made at updates fake_warm_start (k / N)^2, close together where the fake network moves fast: equal steps
  in loss, which would be the right ones, are known afterwards alone (ours; the paper has equal steps in time).
- Guidance is the teacher's alone: psi_1 .. learned what the student draws for prompts, and nothing without.

Its samples lie far from the teacher's without a warm start on pairs; none is the default here, as in the paper.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views, loss_with_gradient, views_of


class DisBack(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        fake_updates: int = 5  # updates of the fake network per student update
        fake_warm_start: Annotated[int, Field(ge=0)] = 100  # updates of the degradation, the student resting
        waypoints: PositiveInt = (
            5  # N: how many networks lie between the student's score and the teacher, and it
        )
        interval: PositiveInt = 20  # the student's updates towards each of them but the teacher

    options: Options

    def setup(self) -> None:
        super().setup()
        options = self.options
        if (
            len({*self.recorded_at}) < len(self.recorded_at)
            or options.fake_warm_start < options.waypoints - 1
        ):
            raise UserError(
                f"options.waypoints is {options.waypoints}, but {options.fake_warm_start} updates "
                "(options.fake_warm_start) pass no so many different networks: raise it"
            )
        for number in range(1, options.waypoints):
            self.roles.add(waypoint(number), trained=False, rank=options.fake_lora_rank)
        self.towards = 0  # the number of the waypoint that the present turn is led to; 0 is the teacher

    @property
    def recorded_at(self) -> list[int]:
        """After which fake update of the degradation each of psi_1 .. psi_N-1 is recorded."""
        options = self.options
        return [
            max(k, round(options.fake_warm_start * (k / options.waypoints) ** 2))
            for k in range(1, options.waypoints)
        ]

    def target_of(self, step: int) -> int:
        """The waypoint that the student is led to at the method's ``step``; 0 is the teacher."""
        options = self.options
        cycles = (step - options.warm_start - options.fake_warm_start) // (options.fake_updates + 1)
        return max(options.waypoints - 1 - max(cycles, 0) // options.interval, 0)

    def after_step(self, turn: Turn) -> None:
        done = turn.step - self.options.warm_start + 1
        if turn.network == "fake" and done in self.recorded_at:
            self.roles.become(waypoint(self.recorded_at.index(done) + 1), "fake")

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        self.towards = self.target_of(turn.step)
        return super().loss(turn, batch)

    def views(self, x: Tensor, batch: Batch) -> Views:
        """What the fake network and the present target see in x [B, C, H, W], noised."""
        options = self.options
        if not self.towards:
            return super().views(x, batch)
        target = self.roles[waypoint(self.towards)]
        return views_of(self.fake, target, x, batch, options, 1.0)

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            field = self.views(x, batch).field
        return loss_with_gradient(x, field), {"field": mean_size(field)}


def waypoint(number: int) -> str:
    """The role's name."""
    return f"waypoint-{number}"
