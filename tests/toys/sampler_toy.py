"""What the tests of drawing share: Stable Diffusion's table as a scheduler, and a Gaussian of any output kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.diffusion.path import Path
from stepdistill.families.condition import Condition
from stepdistill.testing.toys import Gaussian

MEAN, DEVIATION = 0.4, 0.6


def teacher_scheduler(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **more)


class Output(nn.Module):
    """A closed-form Gaussian as a network of any output kind."""

    def __init__(self, path: Path, kind: Any) -> None:
        super().__init__()
        self.x0, self.path, self.kind = Gaussian(path, MEAN, DEVIATION), path, kind

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        said = self.path.read(self.x0(x, t, cond), "x0", x, t)
        return self.path.target(said.x0, said.eps, t, self.kind)
