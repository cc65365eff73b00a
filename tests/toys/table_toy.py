"""What most teachers are, in two dimensions: eps networks on Stable Diffusion's discrete table."""

from __future__ import annotations

from consistency_toy import table_path
from mixture_toy import CorrectedFamily
from torch import Tensor, nn

from stepdistill.diffusion.path import per_sample
from stepdistill.families.condition import Condition
from stepdistill.testing.toys import Gaussian, Mixture, Perceptron, ToyTeacher

TABLE = table_path()


class Eps(nn.Module):
    """The eps output (x - alpha x0) / sigma of an x0 network on the table."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.inner = net, nn.Identity()  # what a discriminator would read

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = (per_sample(value, x) for value in TABLE.alpha_sigma(t))
        said = (x - alpha * self.net(x, t, cond)) / sigma
        return self.inner(said)  # type: ignore[no-any-return]


class CorrectedEps(nn.Module):
    """The exact eps of the mixture and a perceptron's correction to it, zero at the start: where alpha is small, the x0
    read from it is as nervous as that of real eps networks."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.correction = Eps(Mixture(TABLE)), Perceptron()
        nn.init.zeros_(self.correction.last.weight)
        nn.init.zeros_(self.correction.last.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.exact(x, t, cond) + self.correction(x, t, cond)  # type: ignore[no-any-return]


def gaussian_eps(mean: float, deviation: float) -> Eps:
    """The exact eps network of N(mean, deviation^2 I)."""
    return Eps(Gaussian(TABLE, mean, deviation))


def eps_teacher() -> ToyTeacher:
    """The exact mixture of four modes as an eps network."""
    teacher = ToyTeacher(CorrectedEps(), TABLE, "eps")
    teacher.denoiser.family = CorrectedFamily()
    return teacher
