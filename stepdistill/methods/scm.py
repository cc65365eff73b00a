"""Continuous-time consistency: what the consistency function changes by along the teacher's trajectory is taken back.

Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (sCM), 2410.11081; its
distillation, sCD. What it shares with rCM stands in stepdistill/losses/continuous_time.py.

- TrigFlow view of any path: at the angle a = atan2(sigma, alpha) the state y = x_t / |(alpha, sigma)| is cos(a) x0 +
  sin(a) eps, and what a network says of (x0, eps) is F = cos(a) eps - sin(a) x0, the velocity dy/da; its x0 is then
  f = cos(a) y - sin(a) F, and y itself at a = 0. Data deviation 1, as latents have it.
- Tangent (algorithm 1), cos(a) df/da with v the guided teacher's F and d/da along its trajectory:
  g = -cos^2(a) (F - v) - r cos(a) sin(a) (y + dF/da), the second part fading in, r = min(1, step / ``tangent_warmup``).
  dF/da is forward-mode or a difference, never with a gradient through it.
- Normalised: g / (|g| + c), here with the root mean square for |.|, so that c holds at any resolution.
- Loss (algorithm 1): e^w |F - sg[F + g]|^2 - w per element, with the adaptive weight w(a) learnt alongside.
- Levels tan(a) are lognormal. On a discrete table times are its own entries and derivatives differences over whole
  ones: between two of them no embedding was trained, and the exact derivative of a pretrained one is mostly that.

Clean latents come from cached samples of the teacher, or from images. Students are drawn with fresh noise between
steps, as f is x0. Left out: training without a teacher (sCT); changes of the network (embedding, normalisation).
"""

from __future__ import annotations

from stepdistill.losses.batch import Batch
from stepdistill.losses.continuous_time import ContinuousConsistency, ContinuousOptions
from stepdistill.losses.contract import Loss, Turn


class SCM(ContinuousConsistency):
    """See the module's text."""

    class Options(ContinuousOptions):
        pass

    options: Options

    def phase(self, step: int) -> str:
        return "derivative fades in" if step < self.options.tangent_warmup else "whole derivative"

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        return Loss(*self.consistency(turn.step, batch))
