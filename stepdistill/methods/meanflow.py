"""MeanFlow distillation: the mean velocity of a jump, from the teacher's velocity and its own total derivative.

Geng et al. 2025, "Mean Flows for One-step Generative Modeling", 2505.13447, with the teacher's guided velocity in the
place of the conditional one; then it is Eulerian map distillation (Boffi et al. 2024, 2406.07507).

- The mean velocity u(x, t, s) = (1 / (t - s)) integral_s^t v is the one function with u + (t - s) Du/Dt = v, where
  Du/Dt = d_t u + grad_x u . v is its derivative along the trajectory (MeanFlow identity, eq. 6 and 8).
- Loss (eq. 9 and 10): |u - sg[v - (t - s) Du/Dt]|^2. The derivative is forward-mode or a difference along the teacher's
  trajectory (``stepdistill/losses/map_equations.py``), with no gradient through it. It fades in over ``tangent_warmup``
  updates: until then the target is the velocity, which a student without a warm start has at its start.
- Weights (eq. 22): |e|^2 / sg(|e|^2 + c)^p, with |.|^2 summed over a sample. The paper's p is 1, for targets that are
  noisy everywhere; a teacher's are exact for short jumps, and p = 1 makes outliers of the long ones: here p is 1/2.
- What the derivative sees of fast features of t comes back through the target and can grow. Differences over a wide
  ``derivative_step`` smooth it, and are as exact as the teacher's Heun step over it.
- Guidance is the teacher's, so the student's one call has it baked in (4.2 mixes it from the student's own u instead).

Clean latents come from cached samples of the teacher, from images, or from the student. The student is told t - s
through a slot that is zero at the start, of its own class or beside what embeds its timestep. Added: ``warm_start`` on
pairs, and jumps from where drawings start. Left out: training without a teacher; label dropout, as nothing is
unconditional.
"""

from __future__ import annotations

from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.flow_maps import FlowMapMethod, JumpOptions, adaptive, logit_normal


class MeanFlow(FlowMapMethod):
    """See the module's text."""

    class Options(JumpOptions):
        guidance: float = 3.0  # of the teacher's velocity, and of the cached samples
        time_mean: float = -0.4  # of the logit of both times (MeanFlow table 4)
        time_deviation: float = 1.0  # of the same

    options: Options

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        if turn.step < options.warm_start:
            return Loss(self.regression(batch))
        a, b = (logit_normal(draws, name, options.time_mean, options.time_deviation) for name in ("a", "b"))
        x, _, t, s, cond = self.points(batch, a, b)
        along = self.equations.along(x, t, s, cond)
        now = self.student.flow_velocity(x, t, s, cond)
        error = now - self.equations.eulerian(x, t, s, cond, now, self.share(turn.step), along)
        logs = {"residual": rms(error), **self.derivative.logs()}
        return Loss(adaptive(error, options.power, options.offset), logs)
