"""Trajectory-backward consistency: neighbours on the teacher's own trajectory from noise; no latents are needed.

Tang et al. 2025, "Image-Free Timestep Distillation via Continuous-Time Consistency with Trajectory-Sampled Pairs",
2511.20410 (the Trajectory-Backward Consistency Model).

- Trajectory: from noise, ``route`` guided DDIM steps of the teacher to the path's last time. Its times are drawn anew
  for every sample, the first 1 and then one in each interval of a reference route with flow times shift u / (1 + (shift
  - 1) u), uniform in the angle atan2(sigma, alpha): with fixed times the student would learn no others.
- Loss: d(f(x_i), sg f(x_(i+1))) over ``points`` pairs of each trajectory. The teacher's calls are paid for by the
  trajectory, and what the student meets in training is what it meets in sampling, also where teacher and data differ.
- The paper's loss is continuous in time, on the tangent df/dt that its residual divided by the step tends to; here it
  stays a difference. d = sqrt(|r|^2 + c^2) - c with one norm a sample has the gradient r / |r|, which normalises the
  residual as the paper normalises the tangent. The pair at pure noise, which the paper drops (its weight 1 / tan t is
  0 there), is kept: every drawing starts there.
- f is x0, and the identity at the last time; on a discrete table with the scalings of diffusers' LCMScheduler.

Left out: the tangent with its warm-up and calm-down, the learned weight, the embedded guidance, the filter that drops
black pictures.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.shift import shifted
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import SAMPLER_GRID, Target, consistency_function, last_time
from stepdistill.losses.contract import Loss, Method, MethodOptions, Turn
from stepdistill.losses.distances import pseudo_huber, rms
from stepdistill.networks.sampler import Sampler
from stepdistill.system.memory import sent


class TBCM(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(MethodOptions):
        group: ClassVar[str] = "consistency"
        guidance: float = 4.5  # of the teacher; the paper draws it from 4, 4.5 and 5 and embeds it
        route: int = 16  # steps of a trajectory
        route_shift: float = 2.5  # of the reference route, in flow times
        points: int = 16  # pairs of each trajectory that are learned from; all by default
        huber: float = 0.00054  # c over the square root of the dimension (iCT, 2310.14189)
        target_decay: float = 0.0  # decay of the target network; 0: the student itself

    options: Options

    def setup(self) -> None:
        self.target = Target(self.roles, self.options.target_decay)

    def sampler(self) -> Sampler:
        return Sampler(self.times, True, SAMPLER_GRID)

    def route(self, batch: Batch) -> Tensor:
        """The times of each sample's trajectory, [B, route + 1], strictly descending from 1 to the last time."""
        options, path = self.options, self.student.path
        u = torch.linspace(1, 0, options.route)
        # Flow times, at the same signal-to-noise ratio on this path; a table ends before the flow time 1.
        start = STRAIGHT.time_of(path.angle(torch.ones(1)))
        angles = STRAIGHT.angle(start * shifted(u, options.route_shift))
        lowest = torch.tensor([last_time(path)])
        reference = sent(path.angle(path.time_of(angles).maximum(lowest)), batch.draws.device)
        share = 1 - torch.stack([batch.draws.uniform(f"time {i}") for i in range(1, options.route)], 1)
        # share in (0, 1]: never the lower end
        inner = path.time_of(torch.lerp(reference[1:], reference[:-1], share))
        first, last = (torch.full_like(inner[:, :1], end) for end in (1.0, last_time(path)))
        return torch.cat([first, inner, last], 1)

    @torch.no_grad()
    def trajectory(self, noise: Tensor, times: Tensor, cond: Condition) -> Tensor:
        """The teacher's states [B, route + 1, C, H, W] at those times, from noise [B, C, H, W] on."""
        states = [noise]
        for t, s in pairwise(times.unbind(1)):
            now = self.teacher.predict(states[-1], t, cond, guidance=self.options.guidance)
            states.append(now.at(s))
        return torch.stack(states, 1)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        times = self.route(batch)
        states = self.trajectory(batch.noise, times, batch.cond)
        count, route = len(times), self.options.route
        order = batch.draws.normal("points", (route,)).argsort(1)[:, : self.options.points]
        i = order.flatten()
        row = torch.arange(count, device=i.device).repeat_interleave(order.shape[1])
        cond = batch.cond.rows(row)
        with torch.no_grad():
            target = consistency_function(self.target.denoiser, states[row, i + 1], times[row, i + 1], cond)
        residual = consistency_function(self.student, states[row, i], times[row, i], cond) - target
        return Loss(pseudo_huber(residual, self.options.huber).mean(), {"residual": rms(residual)})

    def after_step(self, turn: Turn) -> None:
        self.target.update()
