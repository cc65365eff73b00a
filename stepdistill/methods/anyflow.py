"""AnyFlow: a flow map, then distribution matching of what the map itself draws in any number of steps.

"AnyFlow", 2026, 2605.13724. Two stages:

- The map: Eulerian distillation, |u - sg[v - (t - s) Du/Dt]|^2 at noised clean latents, each sample over its own value
  (the weight of ``JumpOptions`` at p = 1). Half of the jumps have no length, a quarter ends in data; both times are
  uniform, then shifted by 5. Derivatives are central differences.
- On-policy: for N of ``counts`` steps and one of them at random, from t_g to t_{g+1}, the drawing is three jumps of the
  map, 1 -> t_g -> t_{g+1} -> 0, where its others would do no more (the semigroup), with a gradient through all three.
  Their end x moves along DMD's field (x0_fake - x0_real) / mean|x - x0_real| (Yin et al. 2023, 2311.18828, eq. 7 and
  8); a fake score follows it. The first stage's loss goes on beside it.

Differs: v is the teacher's guided velocity where the paper takes eps - x0 and splits the guidance off the student's own
output; samples with s = t are weighed as all are, not by a mean over the batch; no weight t sqrt(1 - t), which leaves
out drawing's first jump. ``guidance`` is on our scale, the paper's w + 1. Start values of ours: a fake update for each
of the student. Added: ``warm_start`` on pairs. ``second_time: stock`` makes Wan 2.1 the paper's own class,
which draws in any number of steps; elsewhere a student's few jumps are folded into its stock class.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT, on_straight
from stepdistill.diffusion.path import per_sample
from stepdistill.diffusion.remembered import constant
from stepdistill.diffusion.shift import shifted
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.distances import mean_size, rms
from stepdistill.losses.fake_score import FakeTurnOptions, denoising_loss, loss_with_gradient, turn_at
from stepdistill.losses.flow_maps import FlowMapMethod, JumpOptions, adaptive, teacher_prediction
from stepdistill.networks.derivative import Way
from stepdistill.networks.sampler import schedule_times


class AnyFlow(FlowMapMethod):
    """See the module's text."""

    class Options(JumpOptions, FakeTurnOptions):
        guidance: float = 4.0  # of the teacher's velocity, and of the cached samples
        same: float = 0.5  # share of samples with s = t: plain velocity matching
        noise_share: float = 0.0  # share of samples that start where every drawing starts
        power: float = 1.0  # p of the weight
        offset: float = 1e-5  # c of the weight
        derivative: Way = "difference"  # exact, difference, or the first where it can be had
        time_shift: PositiveFloat = 5.0  # of both times
        map_updates: Annotated[int, Field(ge=0)] = (
            0  # of the map alone, after the warm start; 6000 in the paper
        )
        map_lr_ratio: PositiveFloat = 25.0  # their learning rate over train.lr
        counts: tuple[PositiveInt, ...] = (2, 4, 8, 16, 50)  # numbers of steps whose drawings are matched
        map_weight: float = 1.0  # of the map's loss beside the matching
        score_guidance: float | None = None  # of the real score where it should differ

        @property
        def score_scale(self) -> float:
            return self.guidance if self.score_guidance is None else self.score_guidance

        @property
        def alone(self) -> int:
            """The student's updates before the matching."""
            return self.warm_start + self.map_updates

    options: Options

    def setup(self) -> None:
        super().setup()
        self.fake = self.roles.add("fake")

    def trained(self) -> dict[str, Trained]:
        return {**super().trained(), "fake": Trained("fake", follows=True)}

    def turn(self, step: int) -> Turn:
        return Turn(turn_at(step, self.options, self.options.alone), step)

    def lr_ratio(self, turn: Turn) -> float:
        if turn.network == "fake":
            return self.options.fake_lr_ratio
        in_map = self.options.warm_start <= turn.step < self.options.alone
        return self.options.map_lr_ratio if in_map else super().lr_ratio(turn)

    def phase(self, step: int) -> str:
        in_map = self.options.warm_start <= step < self.options.alone
        return "flow map" if in_map else self.options.phase(step, self.options.alone)

    def rollout(self, batch: Batch) -> Tensor:
        """Clean ends [B, ...] of the map's three jumps about a step at random, with their graph."""
        draws, path = batch.draws, self.student.path
        steps = self.options.counts[draws.shared_integer("count", len(self.options.counts))]
        own = constant(schedule_times(path, steps), batch.noise.device)
        grid = [*on_straight(path, own, own)[1].unbind(), own.new_zeros(())]
        g = draws.shared_integer("exit", steps)
        return self.through(
            batch.noise, [grid[g], grid[g + 1], grid[-1]], batch.cond, [g > 0, True, g + 1 < steps]
        )

    def through(self, noise: Tensor, ends: list[Tensor], cond: Condition, made: list[bool]) -> Tensor:
        """Where jumps from ``noise`` to one end after the other lead, but for those of no length."""
        x, t = self.beginning(noise)
        for end, jumps in zip(ends, made, strict=True):
            if jumps:
                s = end.expand(len(x))
                x, t = x - per_sample(t - s, x) * self.student.flow_velocity(x, t, s, cond), s
        return x

    @torch.no_grad()
    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """Where DMD moves the samples x [B, ...] away from."""
        options, draws = self.options, batch.draws
        r = draws.uniform("score t", self.least, self.last)
        x_r = STRAIGHT.noised(x, draws.normal("score eps", tuple(x.shape[1:])), r)
        real = teacher_prediction(self.teacher, x_r, r, batch.cond, options.score_scale).x0
        apart = self.fake.predict_on(STRAIGHT, x_r, r, batch.cond).x0 - real
        return apart / per_sample((x - real).abs().flatten(1).mean(1) + 1e-6, x)

    def of_map(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """The map's loss, and its error's size."""
        options, draws = self.options, batch.draws
        a, b = (shifted(draws.uniform(name, self.least, 1.0), options.time_shift) for name in ("a", "b"))
        x, _, t, s, cond = self.points(batch, a, b)
        along = self.equations.along(x, t, s, cond)
        now = self.student.flow_velocity(x, t, s, cond)
        error = now - self.equations.eulerian(x, t, s, cond, now, self.share(step), along)
        return adaptive(error, options.power, options.offset), rms(error)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options = self.options
        if turn.network == "fake":
            with torch.no_grad():
                x = self.rollout(batch)
            loss = denoising_loss(self.fake, x, batch, options.fake_loss)
            return Loss(loss, {"denoising": loss})
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        matches, logs, loss = turn.step >= options.alone, dict[str, Tensor](), batch.noise.new_zeros(())
        if not matches or options.map_weight:
            loss, logs["residual"] = self.of_map(batch, turn.step)
            loss = options.map_weight * loss if matches else loss
        if matches:
            x = self.rollout(batch)
            logs["field"] = mean_size(field := self.field(x.detach(), batch))
            loss = loss + loss_with_gradient(x, field)
        return Loss(loss, {**logs, **self.derivative.logs()})
