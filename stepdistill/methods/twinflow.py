"""TwinFlow: a flow map whose twin follows its own samples, in one network and, by data, without a teacher.

"TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows", 2025, 2512.05150. ``parts`` are:

- one step (t = 1, s = 0), short jumps (s within 5 % below t) and any jumps of noised clean latents, by the recursive
  target of order N: with F = u(x_t, t, s), F_v the velocity at x_t, a leg x' = x_t - h F_v, h = 0.01, and N equal jumps
  F_i over D_i from x' to s by an average of the network, F* = F - clamp(((t - s) F - sum F_i D_i) / h - F_v, +-1).
- the student's own one-step samples, noised: there the twin (``losses/twin.py``) learns eps - x0.

One-step samples also move by 0.5 l(F, sg[F - clamp(F_twin - F_real, +-1)]) at their clean prediction, noised anew:
DMD's direction, as two velocities differ by -(x0_twin - x0_real) / t; 0 where the twin is real. l is |e|^2 of a sample
over sg sqrt(|e|^2 + 1e-6) (Barron's loss at alpha = 1), for jumps times tan((1 - (t - s)) pi / 2.5) + 1.

``velocity: data`` is the paper's, F_v = eps - x0 and F_real = u(x, t, t), and calls no teacher; ``teacher`` takes its
guided velocity for both. Ours: equal parts; |.|^2 is a mean in l; the second time tells the twin, in the paper two
negative times; ``warm_start`` on pairs, of which alone ``same``, ``to_data`` and ``noise_share`` speak, with the twin's
part beside it. Targets need jumps of any length: ``warm_times: all``. Left out: guidance in F_v, re-noising in drawing.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import per_sample
from stepdistill.diffusion.remembered import constant
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import Target
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import mean_size, rms, robust
from stepdistill.losses.flow_maps import PointOptions, TwoTimeMethod, WarmMapOptions
from stepdistill.losses.map_equations import SHORTEST
from stepdistill.losses.twin import twin_prediction

Share = Annotated[float, Field(ge=0)]
ONE_STEP, SHORT, ANY, OWN = range(4)
LEG, NEAR = 0.01, 0.05  # h, and how far below t a short jump ends


class TwinFlow(TwoTimeMethod):
    """See the module's text."""

    class Options(PointOptions, WarmMapOptions):
        # Shares of the one-step, the short and any jumps and of the twin's samples, over their sum.
        parts: tuple[Share, Share, Share, Share] = (0.25, 0.25, 0.25, 0.25)
        velocity: Literal["data", "teacher"] = "data"  # what F_v and F_real are
        order: Annotated[int, Field(ge=1)] = 2  # N, jumps after the first leg
        target_decay: float = 0.99  # of the average that makes them; 0: the student itself
        rectify: float = 0.5  # weight of the twin's difference from the real velocity

    options: Options

    def setup(self) -> None:
        super().setup()
        if not any(self.options.parts):
            raise UserError("options.parts are all 0: give at least one part of the batch a share")
        self.target = Target(self.roles, self.options.target_decay)

    def phase(self, step: int) -> str:
        return "warm start" if step < self.options.warm_start else "twins"

    def part(self, draws: Draws) -> Tensor:
        """Which of the four each sample is of, [B]."""
        bounds = [sum(self.options.parts[: i + 1]) / sum(self.options.parts) for i in range(3)]
        drawn = draws.uniform("part")
        return torch.bucketize(drawn, constant(bounds, drawn.device), right=True)

    def jumps(self, draws: Draws, a: Tensor, b: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, t = (part := self.part(draws)) == ONE_STEP, torch.maximum(a, b).minimum(last)
        near = t * (1 - NEAR * draws.uniform("near"))
        s = torch.where(part == SHORT, near, torch.minimum(a, b).minimum(last))
        return torch.where(first, last, t), torch.where(first, 0.0, s), first

    @torch.no_grad()
    def wanted(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, cond: Condition, now: Tensor) -> Tensor:
        """F* [B, ...] of jumps from t to s, where the velocity is v and the mean velocity ``now``."""
        leg = (t - s).clamp_max(LEG)
        y, begin, summed = x - per_sample(leg, x) * v, t - leg, torch.zeros_like(x)
        width = per_sample((begin - s) / self.options.order, x)
        for k in range(self.options.order):
            at, to = (torch.lerp(begin, s, i / self.options.order) for i in (k, k + 1))
            mean = self.target.denoiser.predict_on(STRAIGHT, y, at, cond, to).velocity
            y, summed = y - width * mean, summed + width * mean
        apart = (per_sample(t - s, x) * now - summed) / per_sample(leg.clamp_min(SHORTEST), x) - v
        return torch.where(per_sample(leg, x) > SHORTEST, now - apart.clamp(-1, 1), v)

    def noised_anew(self, batch: Batch, name: str, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clean x [n, ...] of the samples ``rows`` noised to a time at random: the state, the noise and the time."""
        r = batch.draws.uniform(f"{name} t", self.least, self.last)[rows]
        eps = batch.draws.normal(f"{name} eps", tuple(x.shape[1:]))[rows]
        return STRAIGHT.noised(x, eps, r), eps, r

    @torch.no_grad()
    def field(self, x: Tensor, r: Tensor, cond: Condition) -> Tensor:
        """F_twin - F_real [B, ...] at x [B, ...] and r [B], within 1."""
        by_data = self.options.velocity == "data"
        real = self.student.flow_velocity(x, r, r, cond) if by_data else self.velocity(x, r, cond)
        return (twin_prediction(self.student, x, r, cond).velocity - real).clamp(-1, 1)

    def of_jumps(self, batch: Batch, rows: Tensor, first: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses [n] of the samples ``rows`` [n], of which ``first`` are one-step ones, and logs."""
        a, b = (batch.draws.uniform(name, self.least, self.last) for name in ("a", "b"))
        x, x0, t, s, cond = self.points(batch, a, b)
        x, x0, t, s, cond = x[rows], x0[rows], t[rows], s[rows], cond.rows(rows)
        by_data = self.options.velocity == "data"
        v = (x - x0) / per_sample(t, x) if by_data else self.velocity(x, t, cond)
        now = self.student.flow_velocity(x, t, s, cond)
        error = now - self.wanted(x, v, t, s, cond, now)
        logs = {"residual": rms(error)}
        each = robust(error) * (torch.tan((1 - (t - s)) * math.pi / 2.5) + 1)
        if len(i := first.nonzero()[:, 0]):
            own = (x[i] - per_sample(t[i], x) * now[i]).detach()
            x_r, _, r = self.noised_anew(batch, "renoise", own, rows[i])
            logs["field"] = mean_size(field := self.field(x_r, r, cond.rows(i)))
            moved = robust(now[i] - (now[i] - field).detach())
            each = each.index_add(0, i, self.options.rectify * moved)
        return each, logs

    def of_twin(self, batch: Batch, rows: Tensor) -> Tensor:
        """The losses [n] of the twin at the student's own one-step samples of the noise of ``rows`` [n]."""
        cond = batch.cond.rows(rows)
        with torch.no_grad():
            x, t = self.beginning(batch.noise[rows])
            x0 = x - per_sample(t, x) * self.student.flow_velocity(x, t, torch.zeros_like(t), cond)
        x, eps, r = self.noised_anew(batch, "twin", x0, rows)
        return robust(twin_prediction(self.student, x, r, cond).velocity - (eps - x0))

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        part, logs = self.part(batch.draws), dict[str, Tensor]()
        each = batch.noise.new_zeros(len(part))
        if len(rows := (part == OWN).nonzero()[:, 0]):
            twin = self.of_twin(batch, rows)
            each, logs["twin"] = each.index_put((rows,), twin), twin.detach().mean()
        if turn.step < self.options.warm_start:
            return Loss(self.regression(batch) + each.mean(), logs)
        if len(rows := (part != OWN).nonzero()[:, 0]):
            jumped, of_jumps = self.of_jumps(batch, rows, part[rows] == ONE_STEP)
            each, logs = each.index_put((rows,), jumped), logs | of_jumps
        return Loss(each.mean(), logs)

    def after_step(self, turn: Turn) -> None:
        self.target.update()
