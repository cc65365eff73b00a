"""Trajectory consistency: from any point of a trajectory to any earlier one, by one evaluation.

Zheng et al. 2024, "Trajectory Consistency Distillation", 2402.19159, after Kim et al. 2023, "Consistency Trajectory
Models", 2310.02279, which has the any-to-any map first.

- The map, first order, TCF(1): f(x_t, t, e) = alpha_e x0 + sigma_e eps with what the network says at (x_t, t), the
  identity at e = t. The end e is no input of the network, so the student keeps the teacher's class.
- Loss: d(f(z_n, n, e), f_target(z_m, m, e)) with z_m one guided DDIM step of the teacher from z_n, k = skip N / grid
  timesteps, and e uniform on the grid's times up to m; d = sqrt(r^2 + c^2) - c per element, target weights
  an EMA. The lowest end is timestep 0 of a discrete table, not clean data, as in diffusers' TCDScheduler.
- Strategic stochastic sampling: jump to (1 - gamma) of the next timestep, then noise up to it.

One x0 and one eps cannot be right for all ends at once unless the trajectory is straight in them: the loss has a floor.
Left out: the form with an embedded end, TCF(S+), which the paper finds worse at equal compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.diffusion.path import TablePath
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SourceOptions, Target, examples, jump, last_time, noised
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.distances import elementwise_huber, rms
from stepdistill.networks.sampler import Sampler


class TCD(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(SourceOptions):
        guidance: float = 7.5  # fixed guidance of the teacher's step, and of the cached samples
        guidance_range: tuple[float, float] | None = None  # draw it from here, not embedded; (3, 15) in TCD
        grid: int = 50  # times on the path
        skip: int = 1  # grid times a teacher step skips: k = 1000 / 50 = 20 timesteps
        noise_share: float = 0.0  # share of samples put at pure noise, where every drawing starts
        target_decay: float = 0.95  # decay of the target network; 0: the student itself
        huber: float = 0.001  # c of the pseudo-Huber loss
        gamma: float = (
            0.0  # fresh noise between steps: 0 is what a pipeline does without `eta`; TCD has 0.2 to 0.5
        )

    options: Options

    def setup(self) -> None:
        self.target = Target(self.roles, self.options.target_decay)

    def sampler(self) -> Sampler:
        table, gamma = isinstance(self.student.path, TablePath), self.options.gamma
        if gamma and not table:
            raise UserError(
                f"options.gamma is {gamma:g}, but diffusers' TCDScheduler, which takes it, draws on no flow path: set 0"
            )
        return Sampler(self.times, table, self.options.grid, gamma=gamma if table else None)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        source, options, draws = examples(batch, self.options.source), self.options, batch.draws
        path, end = self.student.path, last_time(self.student.path)
        n = draws.integers("time", options.grid) + 1
        n = torch.where(draws.uniform("start") < options.noise_share, torch.full_like(n, options.grid), n)
        m = (n - options.skip).clamp_min(0)
        e = (draws.uniform("end") * (m + 1)).floor().clamp(max=m)
        t, s, e = (path.shifted(number / options.grid) for number in (n, m, e))
        s, e = s.clamp_min(end), e.clamp_min(end)
        z = noised(path, source.x0, draws.normal("eps", tuple(source.x0.shape[1:])), t)

        guidance: float | Tensor = options.guidance
        if options.guidance_range:
            guidance = draws.uniform("guidance", *options.guidance_range)
        with torch.no_grad():
            z_s = self.teacher.predict(z, t, source.cond, guidance=guidance).at(s)
            target = jump(self.target.denoiser, z_s, s, e, source.cond)
        residual = jump(self.student, z, t, e, source.cond) - target
        return Loss(elementwise_huber(residual, options.huber), {"residual": rms(residual)})

    def after_step(self, turn: Turn) -> None:
        self.target.update()
