"""Latent consistency distillation: one guided solver step apart, two points of a trajectory have one clean end.

Luo et al. 2023, "Latent Consistency Models", 2310.04378, on top of Song et al. 2023, "Consistency Models", 2303.01469.

- Skipping steps (LCM 4.3): on a grid of ``grid`` times, z_n is a noised clean latent (at the noisiest time pure noise,
  as in sampling) and z_m one DDIM step of the teacher towards data, k = skip N / grid timesteps away.
- Guidance in the ODE (LCM 4.2, eq. 14): the step uses the guided x0 and eps; one fixed scale, or a scale drawn per
  sample, and given to the student as an embedding or (``embed_guidance: false``) not.
- Loss (LCM eq. 16): d(f(z_n, n), f_target(z_m, m)) with f = c_skip z + c_out x0, target weights an EMA of the
  student's, and d = sqrt(r^2 + c^2) - c per element (pseudo-Huber).
- Scalings: c_skip = 0.25 / ((10 n)^2 + 0.25), c_out = 10 n / sqrt((10 n)^2 + 0.25) in timesteps n, exactly those of
  diffusers' LCMScheduler; they make f the identity at n = 0, the end of the grid's last step. On a flow path f is x0,
  and the state itself at t = 0.

Clean latents come from images, or from cached samples of the teacher itself. Left out: nothing of the losses.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from stepdistill.families.condition import GUIDANCE
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import (
    SourceOptions,
    Target,
    consistency_function,
    examples,
    last_time,
    noised,
)
from stepdistill.losses.contract import Loss, Method, Predicted, Turn
from stepdistill.losses.distances import elementwise_huber, rms
from stepdistill.networks.sampler import Sampler


class LCM(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)
    shows = frozenset({"prediction"})

    class Options(SourceOptions):
        guidance: float = 7.5  # fixed guidance of the teacher's step, and of the cached samples
        step_guidance: float | None = None  # of the teacher's step where it should differ from the samples'
        guidance_range: tuple[float, float] | None = (
            None  # draw it from here and embed it; (3, 15) in LCM 5.1
        )
        embed_guidance: bool = True  # false: the student is not told what was drawn, as in LCM-LoRA
        grid: int = 50  # times on the path
        skip: int = 1  # grid times a teacher step skips: k = 1000 / 50 = 20 timesteps (LCM 4.3)
        noise_share: float = 0.0  # share of samples put at pure noise, where every drawing starts
        target_decay: float = 0.95  # decay of the target network (LCM 5.1)
        huber: float = 0.001  # c of the pseudo-Huber loss

    options: Options

    def setup(self) -> None:
        self.embedded = self.options.guidance_range is not None and self.options.embed_guidance
        if self.embedded:
            self.student.add_guidance_input()
        self.target = Target(self.roles, self.options.target_decay)

    def sampler(self) -> Sampler:
        guidance = self.options.guidance if self.embedded else None
        return Sampler(self.times, True, self.options.grid, guidance)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        source = examples(batch, self.options.source)
        x0, cond = source.x0, source.cond
        path, draws = self.student.path, batch.draws
        options, eps = self.options, draws.normal("eps", tuple(x0.shape[1:]))
        u = (draws.integers("time", options.grid) + 1) / options.grid
        u = torch.where(draws.uniform("start") < options.noise_share, torch.ones_like(u), u)
        t, s = path.shifted(u), path.shifted((u - options.skip / options.grid).clamp_min(last_time(path)))
        z = noised(path, x0, eps, t)

        guidance: float | Tensor = options.step_guidance or options.guidance
        student_cond = cond
        if options.guidance_range:
            guidance = draws.uniform("guidance", *options.guidance_range)
        if self.embedded:
            student_cond = cond.with_tensor(GUIDANCE, cast(Tensor, guidance))

        with torch.no_grad():
            z_s = self.teacher.predict(z, t, cond, guidance=guidance).at(s)
            target = consistency_function(self.target.denoiser, z_s, s, student_cond)
        seen = consistency_function(self.student, z, t, student_cond)
        residual, predicted = seen - target, Predicted(seen, t, source.prompt, (target, x0))
        logs = {"residual": rms(residual)}
        return Loss(elementwise_huber(residual, options.huber), logs, predicted=predicted)

    def after_step(self, turn: Turn) -> None:
        self.target.update()
