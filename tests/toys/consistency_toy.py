"""What the tests of the consistency methods share: a student that starts as its teacher, and how far it draws from the
end of the teacher's ODE."""

from __future__ import annotations

import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath, TablePath, per_sample
from stepdistill.diffusion.solvers import solve, uniform_times
from stepdistill.families.condition import Condition
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Mixture,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.parallel import take_turn

PATH = FlowPath()


class Corrected(nn.Module):
    """The exact velocity of the mixture on the flow path and a perceptron's correction to it, zero at the start.

    Read from a velocity, x0 = x - t v is the state itself at t = 0, as with the outputs of real networks. An x0 output
    is free there, and nothing would hold ECT's late stages, whose targets never reach clean data."""

    def __init__(self):
        super().__init__()
        self.exact, self.correction = Mixture(PATH), Perceptron()
        nn.init.zeros_(self.correction.last.weight)
        nn.init.zeros_(self.correction.last.bias)

    def forward(self, x, t, cond):
        velocity = (x - self.exact(x, t, cond)) / per_sample(t, x).clamp_min(1e-6)
        return velocity + self.correction(x, t, cond)


def table_path():
    """Stable Diffusion's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return TablePath.from_alphas_cumprod(torch.cumprod(1 - betas, 0))


def mixture_method(kind, times=(1.0,), **options):
    """The method between the exact mixture and a student that starts as it."""
    teacher = ToyTeacher(Corrected(), PATH, "velocity")
    return kind(Copies(teacher, toy_student(Corrected(), PATH, "velocity")), times, kind.Options(**options))


def endpoint(z):
    """The clean end of the mixture's ODE from noise z, by 64 Heun steps."""
    teacher = ToyTeacher(Corrected(), PATH, "velocity")
    times = torch.linspace(1, 0, 65).tolist()
    return solve(lambda x, t: teacher.predict(x, t, Condition()), z, times, "heun")


def error(method, steps):
    """Root mean square distance of what the student draws in ``steps`` to the ODE's end from the same noise."""
    z = torch.randn(2000, *SHAPE, generator=torch.Generator().manual_seed(9))
    sampler = method.sampler()
    sampler = type(sampler)(uniform_times(steps), sampler.renoise, gamma=sampler.gamma)
    with torch.no_grad():
        drawn = sampler.draw(method.student, z, Condition(), lambda call: z)
    return float((drawn - endpoint(z)).square().mean().sqrt())


def train(method, updates, lr=2e-3, batch=64):
    """Trains every network of the method in its turn, on images of the mixture."""
    images = Mixture(PATH).sample(4096, torch.Generator().manual_seed(1))
    trained = {name: list(net.parameters()) for name, net in modules_of(method).items()}
    optimizers = {name: torch.optim.Adam(parameters, lr) for name, parameters in trained.items()}
    for step in range(updates):
        turn = method.turn(step).network
        take_turn(trained, turn)
        for group in optimizers[turn].param_groups:
            group["lr"] = lr * (1 - step / updates)
        rows = torch.arange(step * batch, (step + 1) * batch) % len(images)
        loss, _ = loss_of(method, turn, toy_batch(batch, step, images=images[rows]))
        optimizers[turn].zero_grad()
        loss.backward()
        optimizers[turn].step()
        method.after_step(method.turn(step))
    return method
