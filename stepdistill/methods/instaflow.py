"""InstaFlow: rounds of reflow, each on pairs of the round before, then one-step distillation, all by regression.

Liu et al. 2023, "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation", 2309.06380,
on top of Liu et al. 2022, "Flow Straight and Fast" (rectified flow), 2209.03003.

- Pairs (z, x): x is the teacher's guided sample from noise z, cached once (2209.03003, alg. 1; prompts only).
- Reflow, ``rounds`` of ``reflow_updates``: E_t |v(x_t, t) - (z - x)|^2 on x_t = (1 - t) x + t z. The first round
  learns from the teacher's pairs. Every further one learns from pairs of the flow that the round before ended with,
  frozen and followed for ``flow_steps`` Euler steps from this step's own noise and prompts: the cache is the teacher's.
  The rate is annealed over each round (ours).
- Distillation, the rest: d(z - v(z, 1), x), or for K steps from the K segments' starts; the squared distance for
  ``l2_updates`` updates, then ``distance`` (the paper: 21,500 of L2, then 18,000 of LPIPS). ``own`` is the share of its
  batches whose x is drawn by the reflowed flow, as in the paper; the others take the teacher's pairs.

Differences: the student is read on the straight path from its first update (the paper lets fine-tuning absorb the
change of parameterisation). LPIPS is for pixels; pseudo-Huber on latents stands in its place, which like it grows
linearly and so keeps the student off the mean of what it cannot tell apart. Left out: guidance of the reflowed flow
(1.5 in the paper), as the student learns guided samples without ever seeing the empty prompt; stacked networks.
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


class InstaFlow(Method):
    """See the module's text."""

    class Options(PairOptions):
        guidance: float = 5.0  # of the teacher's samples: 5 for SD 1.5, 6 over-saturates
        rounds: int = 1  # of reflow; a third flow gave the paper no gain
        reflow_updates: int = 1000  # updates of one round
        l2_updates: int = 1000  # first updates of the distillation, by the squared distance
        distance: DistanceName = "huber"  # of the rest of it
        own: float = 1.0  # share in [0, 1] of the distillation's batches drawn by the reflowed flow
        flow_steps: int = 25  # Euler steps of the pairs that the reflowed flow draws
        t_min: float = 0.02  # least time of the reflow loss; below, the velocity is the noise of the reading

    options: Options

    def setup(self) -> None:
        # The flow that the last finished round ended with.
        self.flow = self.roles.add("flow", "student", trained=False)

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def stage(self, step: int) -> int:
        """The round of reflow that an update belongs to, from 0; ``rounds`` in the distillation."""
        options = self.options
        return (
            min(step // options.reflow_updates, options.rounds) if options.reflow_updates else options.rounds
        )

    def phase(self, step: int) -> str:
        options, stage = self.options, self.stage(step)
        if stage < options.rounds:
            return f"reflow {stage + 1}" if options.rounds > 1 else "reflow"
        squared = step < options.rounds * options.reflow_updates + options.l2_updates
        return "squared distillation" if squared and options.distance != "l2" else "distillation"

    def lr_ratio(self, turn: Turn) -> float:
        updates = self.options.reflow_updates
        in_round = self.stage(turn.step) < self.options.rounds
        return stage_rate(turn.step % updates, updates) if in_round else 1.0

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, stage = self.options, self.stage(turn.step)
        own = stage > 0
        if stage == options.rounds:
            own = batch.draws.shared_integer("own", 1000) < 1000 * options.own
        z, x, cond = self.coupling(batch, own)
        if stage < options.rounds:
            loss = reflow_loss(self.student, z, x, cond, batch.draws.uniform("time", options.t_min, 1.0))
            return Loss(loss, {"reflow": loss})
        distilled = turn.step - options.rounds * options.reflow_updates
        name: DistanceName = "l2" if distilled < options.l2_updates else options.distance
        loss = distillation_loss(self.student, self.times, z, x, cond, batch.draws, name)
        return Loss(loss, {"distillation": loss})

    def coupling(self, batch: Batch, own: bool) -> tuple[Tensor, Tensor, Condition]:
        """Noise, the sample that belongs to it and the condition: the reflowed flow's own, or the teacher's."""
        if own:
            x = flow_end(self.flow, batch.noise, batch.cond, self.options.flow_steps)
            return batch.noise, x, batch.cond
        pairs = cast(Examples, batch.pairs)
        return cast(Tensor, pairs.noise), pairs.x0, pairs.cond

    def after_step(self, turn: Turn) -> None:
        if self.stage(turn.step + 1) > self.stage(turn.step):
            self.roles.become("flow", "student")
