"""What the tests of flow-map methods share: a Gaussian's map on any path, its velocity, and a short training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import STRAIGHT, on_other_path
from stepdistill.diffusion.draws import Draws, generator_for
from stepdistill.diffusion.path import FlowPath, Path, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.flow_maps import FlowMapMethod, MapOptions
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_student,
)
from stepdistill.training.parallel import take_turn

MU, C = 0.7, 0.4


class OnPath(GaussianFlowMap):
    """The exact map as the x0 output of a network on another path, its gap in that path's own time."""

    def __init__(self, path: Path, deviation: float = C) -> None:
        super().__init__(MU, deviation)
        self.path = path

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        s = t - cond.tensors.get("gap", torch.zeros_like(t))
        there, time = on_other_path(self.path, x, t, STRAIGHT)
        end = on_other_path(self.path, x, s, STRAIGHT)[1]
        u = super().forward(there, time, Condition({"gap": time - end}))
        return there - per_sample(time, x) * u


class Twinned(GaussianFlowMap):
    """The exact map of a Gaussian whose twin is that Gaussian's exact velocity."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        gap = cond.tensors.get("gap", torch.zeros_like(t))
        return super().forward(x, t, cond.with_tensor("gap", gap.clamp_min(0)))


class Velocity(nn.Module):
    """The velocity of a closed-form denoiser on the straight path, times a scale that learns."""

    def __init__(self, x0: nn.Module) -> None:
        super().__init__()
        self.x0, self.scale = x0, nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.scale * (x - self.x0(x, t, cond)) / per_sample(t, x)


class Quick(Draws):
    """The draws of a batch from one generator for all samples: as random, and cheaper by far."""

    def _one(self, stream: str) -> torch.Generator:
        return generator_for(self.seed, stream, self.step)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.count, *shape, generator=self._one(stream))

    def uniform(self, stream: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.count, generator=self._one(stream))


def from_the_teacher(kind: type[FlowMapMethod], options: MapOptions) -> FlowMapMethod:
    """A one-step student with the Gaussian teacher's weights: at the start it draws the mean."""
    path = FlowPath()
    teacher = ToyTeacher(Velocity(Gaussian(path, MU, C)), path, "velocity")
    student = toy_student(Velocity(Gaussian(path, MU, C)), path, "velocity")
    return kind(Copies(teacher, student), (1.0,), options)


def errors(method: FlowMapMethod, steps: int, count: int = 64, lr: float = 5e-3) -> tuple[float, float]:
    """How far one step is from the trajectories' end mu + c z, before and after a training with falling rate."""
    z = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def error() -> float:
        drawn = method.sampler().draw(method.student, z, Condition(), lambda i: z)
        return float((drawn - (MU + C * z)).square().mean().sqrt())

    start = error()
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    optimizers = {name: torch.optim.Adam(parameters) for name, parameters in trained.items()}
    for step in range(steps):
        turn = method.turn(step).network
        take_turn(trained, turn)
        optimizers[turn].param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizers[turn].zero_grad()
        draws = Quick(0, step, 0, count)
        images = Examples(MU + C * draws.normal("image", SHAPE), Condition())
        batch = Batch(draws, SHAPE, Condition(), torch.zeros(draws.count), images)
        loss_of(method, turn, batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(trained[turn], 1.0)
        optimizers[turn].step()
        method.after_step(method.turn(step))
    return start, error()
