"""SlimFlow: a smaller one-step student, by reflow that anneals from fresh noise and distillation guided by its flow.

Zhu et al. 2024, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", 2407.12718. Source: method
card 8.4.

- A network narrower (``width``) or shallower (``depth``) than the teacher's has random weights: it cannot start as the
  teacher, and on reflow's fixed pairs it would first have to learn from nothing what the teacher's flow is.
- Annealing reflow, the first ``reflow_updates``: pairs (z', x) with z' = sqrt(1 - b^2) z + b xi, xi fresh noise.
  b falls from 1 (flow matching on the teacher's samples) to 0 (reflow); z' is standard normal at every b. Loss:
  |v(x_t, t) - (z' - x)|^2 on x_t = (1 - t) x + t z'.
- Flow-guided distillation, the rest: d(G(z), x) + d(G(xi), sg y) with G(z) = z - v(z, 1) and xi fresh noise, which
  needs no pair: y is where the annealed flow, frozen at the end of the first stage, lands in one Euler step from the
  student's own state m xi + (1 - m) G(xi) at a time m in U(0.2, 0.8).
- For K steps the first term is taken at the K segments' starts; the second, which has no x, stays at the noise end.

A new network on a variance-preserving table returns v, whatever the teacher's returns: what it gets wrong of eps would
be its error in x0 divided by alpha, near 0 where it starts. With width = depth = 1 the student keeps the teacher's
network, weights and output. Its pipeline has the teacher's class and the same network class at the smaller size, which
its config states. Left out: LPIPS and flips, which are for pixels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.path import TablePath
from stepdistill.diffusion.remembered import at_time
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, PairOptions, Turn
from stepdistill.losses.distances import DistanceName, distance
from stepdistill.losses.reflow import distillation_loss, reflow_loss
from stepdistill.losses.regression import annealed
from stepdistill.networks.sampler import Sampler

Share = Annotated[float, Field(gt=0, le=1)]


class SlimFlow(Method):
    """See the module's text."""

    own_network = True

    class Options(PairOptions):
        width: Share = 1.0  # channels over the teacher's; 0.5 has about a quarter of the weights
        depth: Share = 1.0  # layers of each resolution over the teacher's
        reflow_updates: int = 1000  # updates of the first stage; the rest of train.updates distils
        anneal: float = 0.6  # share of them over which b falls to 0 (300k of 500k in the paper)
        anneal_schedule: Literal["linear", "cosine"] = "linear"  # how it falls
        t_min: float = 0.02  # least time of the reflow loss; below, the velocity is the noise of the reading
        guide_weight: float = 1.0  # of the second term of the distillation; 0 leaves it out
        guide_times: tuple[float, float] = (0.2, 0.8)  # range of m
        distance: DistanceName = "l2"  # of both terms

        @property
        def starts_anew(self) -> bool:
            """Whether the student's network is a smaller one of random weights."""
            return (self.width, self.depth) != (1.0, 1.0)

        @property
        def judged_from(self) -> int:
            # Until then it learns a flow: drawn in few steps, one of random weights turns from noise to blur.
            return self.reflow_updates if self.starts_anew else 0

    options: Options

    def setup(self) -> None:
        if self.options.starts_anew:
            self.student.make_slimmer(self.options.width, self.options.depth)
            if isinstance(self.student.path, TablePath):
                self.student.output = "v"
        self.flow = self.roles.add("flow", "student", trained=False)

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def beta(self, step: int) -> float:
        """How much of the pairs' noise is fresh at an update: b in [0, 1], 1 at the first and 0 once annealed."""
        done = min(1.0, step / max(1.0, self.options.anneal * self.options.reflow_updates))
        return 1 - done if self.options.anneal_schedule == "linear" else annealed(done)

    def annealed_noise(self, z: Tensor, batch: Batch, step: int) -> Tensor:
        """z' = sqrt(1 - b^2) z + b xi, [B, C, H, W], at the method's step."""
        beta = self.beta(step)
        return math.sqrt(1 - beta**2) * z + beta * batch.draws.normal("anneal", tuple(z.shape[1:]))

    def guide(self, batch: Batch) -> Tensor:
        """d(G(xi), sg y): the student against its frozen flow's step from the student's own state."""
        xi, cond = batch.noise, batch.cond
        one = at_time(1.0, xi)
        x = self.student.predict(xi, one, cond).x0
        with torch.no_grad():
            m = batch.draws.uniform("guide time", *self.options.guide_times)
            y = self.flow.predict_on(STRAIGHT, STRAIGHT.noised(x, xi, m), m, cond).x0
        return distance(x, y, self.options.distance)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, pairs = self.options, cast(Examples, batch.pairs)
        z, x, cond = cast(Tensor, pairs.noise), pairs.x0, pairs.cond
        if turn.step < options.reflow_updates:
            t = batch.draws.uniform("time", options.t_min, 1.0)
            loss = reflow_loss(self.student, self.annealed_noise(z, batch, turn.step), x, cond, t)
            return Loss(loss, {"reflow": loss})
        loss = distillation_loss(self.student, self.times, z, x, cond, batch.draws, options.distance)
        logs = {"distillation": loss}
        if options.guide_weight:
            logs["guide"] = self.guide(batch)
            loss = loss + options.guide_weight * logs["guide"]
        return Loss(loss, logs)

    def phase(self, step: int) -> str:
        return "reflow" if step < self.options.reflow_updates else "distillation"

    def after_step(self, turn: Turn) -> None:
        if turn.step + 1 == self.options.reflow_updates:
            self.roles.become("flow", "student")
