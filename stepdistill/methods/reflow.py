"""Reflow: fit a velocity to straight lines between noise and the teacher's own sample of it, then to one step.

Liu et al. 2022, "Flow Straight and Fast", 2209.03003; text-conditional in Liu et al. 2023, "InstaFlow", 2309.06380.

- Pairs (z, x) with x the teacher's guided sample from noise z, cached once (alg. 1).
- Reflow, the first ``reflow_updates`` updates (eq. 1 with the coupling of alg. 1): E |v(x_t, t) - (z - x)|^2 on
  x_t = (1 - t) x + t z. The student keeps its own path and output kind: it is read on the straight path, at the
  angle where the signal-to-noise ratios agree, so its weights stay those that diffusers expects.
- Distillation, the rest (2.2, "distillation"): E |x(z, 1) - x|^2 at the noise end, or for K steps at the K starts of
  equal segments. ``fresh`` is the share of batches drawn on the spot from the reflowed student, frozen at the end of
  the first stage, over which the rate is annealed (ours), and followed for ``flow_steps`` Euler steps (the paper
  regenerates its pairs with that flow).
- The reflow loss is squared, as its minimiser must be the mean velocity; the distance of the distillation is free, and
  one that forgives outliers keeps the student off the mean of what it cannot tell apart.

Left out: LPIPS, which is for pixels; further rounds of reflow (see instaflow).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, PairOptions, Turn
from stepdistill.losses.distances import DistanceName
from stepdistill.losses.reflow import distillation_loss, flow_end, reflow_loss, stage_rate
from stepdistill.networks.sampler import Sampler


class Reflow(Method):
    """See the module's text."""

    class Options(PairOptions):
        guidance: float = 5.0  # of the teacher's samples (InstaFlow 4.1, for SD 1.5)
        reflow_updates: int = 1000  # updates of the first stage; the rest of train.updates distils
        t_min: float = (
            0.02  # least time of the reflow loss: below it the velocity is the noise of the reading
        )
        fresh: float = 0.0  # share in [0, 1] of the distillation batches drawn from the reflowed student
        flow_steps: int = 4  # its Euler steps
        distance: DistanceName = "l2"  # of the distillation

    options: Options

    def setup(self) -> None:
        self.flow = self.roles.add("flow", "student", trained=False)

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def phase(self, step: int) -> str:
        return "reflow" if step < self.options.reflow_updates else "distillation"

    def lr_ratio(self, turn: Turn) -> float:
        updates = self.options.reflow_updates
        return stage_rate(turn.step, updates) if turn.step < updates else 1.0

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        pairs = cast(Examples, batch.pairs)
        first = turn.step < self.options.reflow_updates
        return self.reflow_loss(pairs, batch) if first else self.distillation_loss(pairs, batch)

    def reflow_loss(self, pairs: Examples, batch: Batch) -> Loss:
        t = batch.draws.uniform("time", self.options.t_min, 1.0)
        loss = reflow_loss(self.student, cast(Tensor, pairs.noise), pairs.x0, pairs.cond, t)
        return Loss(loss, {"reflow": loss})

    def distillation_loss(self, pairs: Examples, batch: Batch) -> Loss:
        z, x, cond = cast(Tensor, pairs.noise), pairs.x0, pairs.cond
        if batch.draws.shared_integer("fresh", 1000) < 1000 * self.options.fresh:
            z, cond = batch.noise, batch.cond
            x = self.flow_sample(z, cond)
        name = self.options.distance
        loss = distillation_loss(self.student, self.times, z, x, cond, batch.draws, name)
        return Loss(loss, {"distillation": loss})

    def flow_sample(self, z: Tensor, cond: Condition) -> Tensor:
        """The clean end [B, C, H, W] of the reflowed student's trajectory from noise z [B, C, H, W]."""
        return flow_end(self.flow, z, cond, self.options.flow_steps)

    def after_step(self, turn: Turn) -> None:
        if turn.step + 1 == self.options.reflow_updates:
            self.roles.become("flow", "student")
