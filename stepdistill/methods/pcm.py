"""Phased consistency: the trajectory in phases, and in each a consistency map to the phase's own lower edge.

Wang et al. 2024, "Phased Consistency Models", 2405.18407.

- Phases: the student's own times are the edges and the last phase ends at clean data, so that K phases are drawn in K
  deterministic steps, each from edge to edge. (The authors' code floors the edges to a grid of 50, up to ten timesteps
  beside the times it draws at.)
- The map, first order: f(x_t, t) = alpha_e x0 + sigma_e eps to the edge e of t's phase. An edge is the end of the
  phase above it and the start of the one below. Each t has one e, so the map can be exact.
- Loss: d(f(x_t, t), sg f(x_s, s)), x_s one guided DDIM step of the teacher from x_t; where s is the edge the target is
  x_s itself. The target network is the student without gradient; d = sqrt(r^2 + c^2) - c per element.
- Optional adversarial loss, every other update a turn of the discriminator: f and its target are both noised from
  their edge e to one time of the phase above it, and told apart by a head on the teacher's features, with the hinge
  max(0, 1 - D(target)) + max(0, 1 + D(f)); the student's part is -D(f).

Left out: an edge at timestep 0 instead of clean data; heads on nine levels of features (here one).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from stepdistill.diffusion.remembered import constant
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SourceOptions, Target, examples, jump, noised
from stepdistill.losses.contract import Loss, Method, Trained, Turn
from stepdistill.losses.distances import elementwise_huber, rms
from stepdistill.losses.gan import FeatureGan
from stepdistill.networks.sampler import Sampler


class PCM(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(SourceOptions):
        guidance: float = 5.5  # of the teacher's step: w in [4, 5], and g = 1 + w
        grid: int = 50  # times on the path, shared out evenly among the phases
        start_share: float = 0.0  # share of samples put at their phase's start, where the student is called
        target_decay: float = 0.0  # decay of the target network; 0: the student itself
        huber: float = 0.001  # c of the pseudo-Huber loss
        adversarial_weight: float = 0.0  # of the adversarial loss: 0.1 in the authors' code; 0 leaves it out

    options: Options

    def setup(self) -> None:
        self.target = Target(self.roles, self.options.target_decay)
        self.gan = FeatureGan(self.teacher.denoiser) if self.options.adversarial_weight else None

    def trained(self) -> dict[str, Trained]:
        gan = {} if self.gan is None else {"discriminator": Trained(extra=self.gan, follows=True)}
        return {**super().trained(), **gan}

    def turn(self, step: int) -> Turn:
        return Turn("student" if self.gan is None or step % 2 else "discriminator", step)

    def sampler(self) -> Sampler:
        return Sampler(self.times, renoise=False)

    def phase_times(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Start, t, s and edge e of each sample's phase, [B] each: start >= t > s >= e."""
        draws, each = batch.draws, max(1, self.options.grid // len(self.times))
        phase, n = draws.integers("phase", len(self.times)), draws.integers("time", each) + 1
        n = torch.where(draws.uniform("start") < self.options.start_share, torch.full_like(n, each), n)
        path, edges = self.student.path, constant([*self.times, 0.0], n.device)
        start, e = edges[phase], edges[phase + 1]
        low, high = path.unshifted(e), path.unshifted(start)
        t, s = (path.shifted(torch.lerp(low, high, k / each)) for k in (n, n - 1))
        # Both ends of a phase exactly: they decide where the map is the identity.
        return start, torch.where(n == each, start, t), torch.where(n == 1, e, s), e

    def two_jumps(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """The student's jump to the edge, its target [B, C, H, W], start and edge of the phase [B], the conditions."""
        source = examples(batch, self.options.source)
        start, t, s, e = self.phase_times(batch)
        eps = batch.draws.normal("eps", tuple(source.x0.shape[1:]))
        z = noised(self.student.path, source.x0, eps, t)
        with torch.no_grad():
            z_s = self.teacher.predict(z, t, source.cond, guidance=self.options.guidance).at(s)
            target = jump(self.target.denoiser, z_s, s, e, source.cond)
        return jump(self.student, z, t, e, source.cond), target, start, e, source.cond

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if turn.network == "discriminator":
            return self.discriminator_loss(batch)
        jumped, target, start, e, cond = self.two_jumps(batch)
        residual = jumped - target
        loss, logs = elementwise_huber(residual, self.options.huber), {"residual": rms(residual)}
        if self.gan is not None:
            logs["gan"] = -self.gan.logits_above(jumped, e, start, cond, batch).mean()
            loss = loss + self.options.adversarial_weight * logs["gan"]
        return Loss(loss, logs)

    def discriminator_loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            jumped, target, start, e, cond = self.two_jumps(batch)
        gan = cast(FeatureGan, self.gan)
        real, fake = (gan.logits_above(x, e, start, cond, batch) for x in (target, jumped))
        loss = ((1 - real).clamp_min(0) + (1 + fake).clamp_min(0)).mean()
        return Loss(loss, {"discriminator": loss})

    def after_step(self, turn: Turn) -> None:
        self.target.update()
