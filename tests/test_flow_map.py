"""The three objectives of a flow map: zero at the exact map, tied to each other, and what each is blind to."""

from __future__ import annotations

import pytest
import torch
from flow_toy import MU, C, OnPath, errors, from_the_teacher
from torch import Tensor
from toy import SHAPE, Gaussian, GaussianFlowMap, Perceptron, ToyTeacher, toy_batch, toy_student

from stepdistill.methods.flow_map import FlowMap
from stepdistill.path import FlowPath, Path, TrigPath, per_sample
from stepdistill.types import Batch, Condition

OBJECTIVES = ("lagrangian", "eulerian", "semigroup")


class Bent(GaussianFlowMap):
    """The exact map on the diagonal, and off it wrong in proportion to the jump."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return super().forward(x, t, cond) + 0.5 * per_sample(cond.tensors["gap"], x) * x


def flow_map(net: torch.nn.Module | None = None, path: Path | None = None, **options: object) -> FlowMap:
    """From the exact Gaussian teacher to a student that is its exact map, or to ``net``."""
    path = path or FlowPath()
    net = net or (GaussianFlowMap(MU, C) if isinstance(path, FlowPath) else OnPath(path))
    student = toy_student(net, path, "velocity" if isinstance(path, FlowPath) else "x0")
    chosen = FlowMap.Options.model_validate(
        {
            "guidance": 1.0,
            "warmup": 0,
            "power": 0.0,
            "to_data": 0.0,
            **options,
        }  # the teacher is read above time_min
    )
    return FlowMap(ToyTeacher(Gaussian(path, MU, C), path), student, (1.0,), chosen)


def data(count: int = 64, step: int = 0) -> Batch:
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def residual(method: FlowMap) -> float:
    return float(method.loss("student", data())[1]["residual"])


@pytest.mark.parametrize("velocity", ["teacher", "self"])
@pytest.mark.parametrize("path", [FlowPath(), TrigPath()])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_vanish_at_the_exact_map_and_not_at_a_bent_one(
    objective: str, path: Path, velocity: str
) -> None:
    """Pointwise, with the teacher's velocity or the student's own, on the networks' own path or on another."""
    chosen = {"objective": objective, "velocity": velocity, "middle": "uniform", "path": path}
    method = flow_map(**chosen)  # type: ignore[arg-type]
    loss, logs = method.loss("student", data())
    loss.backward()
    assert float(logs["residual"]) < 1e-4
    assert max(abs(float(p.grad)) for p in method.student.net.parameters()) < 2e-3
    if isinstance(path, FlowPath):
        assert residual(flow_map(Bent(MU, C), objective=objective, velocity=velocity, same=0.0)) > 0.03


def shaken(objective: str) -> FlowMap:
    """A map by a random network, its own velocity, the same for every objective."""
    method = flow_map(Perceptron(seed=1), objective=objective, velocity="self", derivative="exact")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return method


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_the_semigroup_ends_in_the_two_other_objectives(objective: str) -> None:
    """For any network with its own velocity: the residual over g tends to the Lagrangian's as m -> s, and over 1 - g to
    the Eulerian's as m -> t. Twice as near, half as far apart: first order."""
    generator = torch.Generator().manual_seed(3)
    x, cond = torch.randn(64, *SHAPE, generator=generator), Condition()
    t, s = torch.rand(2, 64, generator=generator).clamp(0.02, 1).sort(0, descending=True).values
    semigroup, other = shaken("semigroup"), shaken(objective)
    now = semigroup.student.flow_velocity(x, t, s, cond).detach()
    wanted = now - other.target(x, t, s, cond, now, t)
    gaps = []
    for part in (2e-2, 1e-2):
        g = torch.full_like(t, part if objective == "lagrangian" else 1 - part)
        ours = (now - semigroup.target(x, t, s, cond, now, g)) / part
        gaps.append(float((ours - wanted).norm() / wanted.norm()))
    assert gaps[0] < 0.2
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.2)


def test_what_the_diagonal_is_for() -> None:
    """Off it, the semigroup is satisfied by the identity and the self-distilled maps by any other Gaussian's map."""
    other = GaussianFlowMap(MU + 0.3, C)
    nothing = toy_student(Perceptron(), FlowPath(), "velocity").net
    torch.nn.init.zeros_(nothing.get_submodule("last").weight)
    torch.nn.init.zeros_(nothing.get_submodule("last").bias)
    blind = [(nothing, "semigroup")] + [(other, objective) for objective in OBJECTIVES]
    for net, objective in blind:
        assert residual(flow_map(net, objective=objective, velocity="self", same=0.0)) < 1e-4
        assert residual(flow_map(net, objective=objective, velocity="self", same=1.0)) > 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_teacher_it_is_never_called(objective: str) -> None:
    """And the conditional velocity on the diagonal has the exact map's velocity as its mean."""
    method = flow_map(objective=objective, velocity="self", diagonal="data")

    def predict(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was called")

    method.teacher.predict = predict  # type: ignore[method-assign, assignment]
    assert bool(torch.isfinite(method.loss("student", data())[0]))
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(200_000, *SHAPE, generator=generator) for _ in range(2))
    t = torch.full((len(x0),), 0.6)
    x0 = MU + C * x0
    x = (1 - 0.6) * x0 + 0.6 * eps
    with torch.no_grad():
        v = method.student.flow_velocity(x, t, t, Condition())
    error = method.diagonal(x, x0, t, Condition()) - v
    assert abs(float(error.mean())) < 0.01 and abs(float((error * x).mean())) < 0.02


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_own_samples_serve_as_data(objective: str) -> None:
    """Noise and prompts alone; the equations hold at any state, so the exact map is the zero there too."""
    method = flow_map(objective=objective, source="student")
    assert method.needs_of(method.options) == {"noise", "prompts"}
    assert float(method.loss("student", toy_batch(32))[1]["residual"]) < 1e-4


@pytest.mark.parametrize(("objective", "steps"), [("lagrangian", 700), ("semigroup", 200)])
def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end(objective: str, steps: int) -> None:
    """The Eulerian objective is MeanFlow's, and is shown to learn there."""
    options = FlowMap.Options.model_validate(
        {"guidance": 1.0, "warmup": 0, "source": "images", "objective": objective, "derivative": "difference"}
    )
    start, end = errors(from_the_teacher(FlowMap, options), steps)
    assert end < 0.5 * start, (start, end)
