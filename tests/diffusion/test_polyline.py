"""A first-order solver's trajectory is known at every time, and a flow map is regressed on it at any two of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_toy import OnPath

from stepdistill.diffusion.change_of_path import on_straight
from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.polyline import Polyline
from stepdistill.diffusion.solvers import trajectory, uniform_times
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Examples
from stepdistill.methods.flow_map import FlowMap
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
PATHS = [FlowPath(), TablePath.from_alphas_cumprod(torch.cumprod(1 - BETAS, 0))]


@pytest.mark.parametrize("path", PATHS, ids=["flow", "table"])
def test_between_two_ddim_states_lies_the_state_of_a_shorter_step_and_its_direction_is_the_teachers_velocity(
    path: FlowPath | TablePath,
) -> None:
    teacher = ToyTeacher(Gaussian(path, 0.7, 0.4), path)
    noise = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return teacher.predict(x, t, Condition())

    def states_at(grid):
        with torch.no_grad():
            return torch.stack([noise, *trajectory(predict, noise, grid, "ddim")], 1)

    grid = (*uniform_times(4), 0.0)
    line = Polyline.of(states_at(grid), torch.tensor(grid), lambda x, t: on_straight(path, x, t))
    for time in (0.875, 0.6, 0.3):  # one more state on the way, and nothing after it
        shorter = states_at((*[t for t in grid if t > time], time))[:, -1]
        x, t = on_straight(path, shorter, torch.full((16,), time))
        torch.testing.assert_close(line.at(t), x, atol=1e-4, rtol=1e-4)
    for i, time in enumerate(grid[:-1]):
        x, t = line.states[:, i], line.times[i].expand(16)
        own, own_t = states_at(grid)[:, i], torch.full((16,), time)
        said = predict(own, own_t)
        torch.testing.assert_close(line.velocity(t), said.eps - said.x0, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(line.at(t), x)
    torch.testing.assert_close(line.at(line.times[-1].expand(16)), line.states[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=["flow", "table"])
def test_jumps_of_no_length_learn_the_teachers_velocity_between_the_states_too(
    path: FlowPath | TablePath,
) -> None:
    """There the solver's line has the velocity of its start, far off: the exact map would be moved by it."""
    straight = isinstance(path, FlowPath)
    net = GaussianFlowMap(0.7, 0.4) if straight else OnPath(path)
    teacher = ToyTeacher(Gaussian(path, 0.7, 0.4), path)
    options = FlowMap.Options(guidance=1.0, warm_start=10, warm_times="all", pair_steps=4, same=1.0)
    method = FlowMap(
        Copies(teacher, toy_student(net, path, "velocity" if straight else "x0")), (1.0,), options
    )
    plain = toy_batch(64)
    noise = plain.noise
    with torch.no_grad():
        grid = (*uniform_times(4), 0.0)
        states = list(trajectory(lambda x, t: teacher.predict(x, t, Condition()), noise, grid, "ddim"))
        pairs = Examples(states[-1], Condition(), noise, torch.stack(states[:-1], 1))
        loss = loss_of(method, "student", replace(plain, pairs=pairs))[0]
        assert float(loss) < 1e-6
        line = Polyline.of(
            torch.stack([noise, *states], 1), torch.tensor(grid), lambda x, t: on_straight(path, x, t)
        )
        t, s = method._any_times(plain.draws, line)
        assert torch.equal(t, s) and bool((t >= torch.tensor(method.least)).all())
        x = line.at(t)
        off = line.velocity(t) - method.velocity(x, t, Condition())
        assert float(off.square().mean().sqrt()) > 0.1
