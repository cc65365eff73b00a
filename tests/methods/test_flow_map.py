"""The three objectives of a flow map: zero at the exact map, tied to each other, and what each is blind to."""

from __future__ import annotations

import pytest
import torch
from consistency_toy import table_path
from flow_toy import MU, C, OnPath, errors, from_the_teacher
from torch import Tensor

from stepdistill.diffusion.path import FlowPath, Path, TablePath, TrigPath, per_sample
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.methods.flow_map import FlowMap
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
    weights_of,
)

OBJECTIVES = ("lagrangian", "eulerian", "semigroup")


class Bent(GaussianFlowMap):
    """The exact map on the diagonal, and off it wrong in proportion to the jump."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return super().forward(x, t, cond) + 0.5 * per_sample(cond.tensors["gap"], x) * x


def flow_map(
    net: torch.nn.Module | None = None, path: Path | None = None, deviation: float = C, **options: object
) -> FlowMap:
    """From the exact Gaussian teacher to a student that is its exact map, or to ``net``."""
    path = path or FlowPath()
    straight = isinstance(path, FlowPath)
    net = net or (GaussianFlowMap(MU, deviation) if straight else OnPath(path, deviation))
    student = toy_student(net, path, "velocity" if straight else "x0")
    # Jumps to data are closed by the teacher's mean, off by what the last bit of a trajectory bends: in proportion to
    # time_min.
    chosen = FlowMap.Options.model_validate(
        {"guidance": 1.0, "tangent_warmup": 0, "power": 0.0, "time_min": 1e-3, **options}
    )
    return FlowMap(Copies(ToyTeacher(Gaussian(path, MU, deviation), path), student), (1.0,), chosen)


def data(count: int = 64, step: int = 0, deviation: float = C) -> Batch:
    return toy_batch(count, step, pairs=lambda z: MU + deviation * z)


def residual(method: FlowMap, deviation: float = C) -> float:
    return float(loss_of(method, "student", data(deviation=deviation))[1]["residual"])


@pytest.mark.parametrize("velocity", ["teacher", "self"])
@pytest.mark.parametrize("path", [FlowPath(), TrigPath(), table_path()], ids=["flow", "trig", "table"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_vanish_at_the_exact_map_and_not_at_a_bent_one(
    objective: str, path: Path, velocity: str
) -> None:
    """Pointwise, with the teacher's velocity or the student's own, on the networks' own path or on another."""
    chosen = {"objective": objective, "velocity": velocity, "middle": "uniform", "path": path}
    method = flow_map(**chosen)  # type: ignore[arg-type]
    loss, logs = loss_of(method, "student", data())
    loss.backward()
    # A table's least time is that of its first entry, so that its jumps to data are closed from farther.
    assert float(logs["residual"]) < (1e-3 if isinstance(path, TablePath) else 1e-4)
    assert max(abs(float(p.grad)) for p in method.student.net.parameters()) < 5e-3
    if isinstance(path, FlowPath):
        assert residual(flow_map(Bent(MU, C), objective=objective, velocity=velocity, same=0.0)) > 0.03


def test_half_of_the_lagrangians_jumps_to_data_end_at_the_least_time() -> None:
    """There its equation holds; the other half is closed from there."""
    method = flow_map(objective="lagrangian", to_data=1.0, same=0.0, time_min=0.02)
    ends: list[Tensor] = []
    method.student.net.register_forward_pre_hook(
        lambda _, given: ends.append(given[1] - given[2].tensors["gap"])
    )
    loss_of(method, "student", data(1000))
    s = ends[0]
    assert bool(((s.abs() < 1e-6) | ((s - 0.02).abs() < 1e-6)).all())
    assert float((s > 0.01).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 1000**0.5)


def test_the_residual_is_the_errors_root_mean_square() -> None:
    """At power 0 the loss is the mean of |error|^2 over samples of two elements."""
    loss, logs = loss_of(flow_map(Bent(MU, C)), "student", data())
    assert loss.item() == pytest.approx(2 * float(logs["residual"]) ** 2, rel=1e-5)
    assert not any(value.requires_grad for value in logs.values())


@pytest.mark.parametrize("way", ["exact", "difference"])
@pytest.mark.parametrize("deviation", [0.4, 0.05, 0.01, 0.003])
@pytest.mark.parametrize("path", [FlowPath(), table_path()], ids=["flow", "table"])
def test_jumps_that_end_in_data_are_right_also_for_data_finer_than_the_least_time(
    path: Path, deviation: float, way: str
) -> None:
    """With the defaults' time_min. Read at the state of time 0 the teacher would be off by 0.02 to 0.7 of |u| ~ 1."""
    method = flow_map(
        path=path, deviation=deviation, to_data=1.0, same=0.0, time_min=0.01, derivative=way, noise_share=1.0
    )
    assert residual(method, deviation) < (0.01 if way == "exact" else 0.04)
    _, _, t, s, _ = method.points(data(), torch.rand(64), torch.rand(64))
    ends = method.read_ends(data().draws, t, s)
    assert method.least >= 0.01 and not bool(s.any())
    assert {round(float(end), 6) for end in ends} == {0.0, round(method.least, 6)}
    table = isinstance(path, TablePath)
    assert method.least == pytest.approx(
        0.0283 if table else 0.01, abs=3e-4
    )  # sigma / (alpha + sigma) of entry 0


@pytest.mark.parametrize("path", [FlowPath(), table_path()], ids=["flow", "table"])
@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_differences_are_of_second_order_where_drawings_start(objective: str, path: Path) -> None:
    """At the exact map, for widths as recipes have them. A difference of u is off by 0.05 there at h = 0.12, and past a
    table's end by 0.16 at any h."""
    errors = []
    for step in (0.12, 0.06):
        method = flow_map(
            path=path, objective=objective, same=0.0, to_data=0.0 if objective == "lagrangian" else 1.0,
            noise_share=1.0, derivative="difference", derivative_step=step,
        )  # fmt: skip
        errors.append(residual(method))
    assert errors[0] < 0.012
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_a_jump_shorter_than_the_difference_learns_the_teachers_own_step(objective: str) -> None:
    """Whatever the student says: the target is the mean velocity of Heun's steps from its start, two if that moves."""
    method = flow_map(Perceptron(seed=1), objective=objective, derivative="difference", derivative_step=0.1)
    x, t = data().noise, torch.full((64,), 0.7)
    s = t - 0.08
    now = method.student.flow_velocity(x, t, s, Condition()).detach()
    steps, y = (2 if objective == "eulerian" else 1), x
    for k in range(steps):
        width = 0.08 / steps
        v = method.velocity(y, t - k * width, Condition())
        y = y - width * (v + method.velocity(y - width * v, t - (k + 1) * width, Condition())) / 2
    mean = (x - y) / 0.08
    torch.testing.assert_close(method.target(x, t, s, Condition(), now, t), mean, atol=1e-5, rtol=1e-4)


class Plain(torch.autograd.Function):
    """The identity without a forward-mode rule."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()


class WithoutForwardMode(GaussianFlowMap):
    """The exact map in an operation that has no forward mode."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with torch.no_grad():
            u = super().forward(x, t, cond)
        return Plain.apply(u) + 0 * self.mean  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian"])
def test_without_forward_mode_the_first_call_already_follows_the_trajectory(objective: str) -> None:
    method = flow_map(
        WithoutForwardMode(MU, C), objective=objective, derivative_step=0.12, noise_share=1.0, same=0.0
    )
    assert method.derivative.way == "auto"
    assert residual(method) < 0.012
    assert method.derivative.way == "difference"


def test_a_leg_by_the_teacher_is_right_at_the_exact_map_and_ties_the_semigroup_to_the_velocity() -> None:
    """The identity satisfies the semigroup, and not the semigroup whose first jump the teacher makes."""
    leg = {"objective": "semigroup", "first_leg": 0.08, "same": 0.0}
    assert residual(flow_map(**leg)) < 2e-3  # type: ignore[arg-type]
    nothing = toy_student(Perceptron(), FlowPath(), "velocity").net
    torch.nn.init.zeros_(nothing.get_submodule("last").weight)
    torch.nn.init.zeros_(nothing.get_submodule("last").bias)
    assert residual(flow_map(nothing, **leg)) > 0.1  # type: ignore[arg-type]
    assert residual(flow_map(nothing, **{**leg, "first_leg": 0.0})) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["lagrangian", "eulerian", "semigroup"])
def test_a_warm_start_goes_on_with_the_whole_derivative(objective: str) -> None:
    """Its end, here the exact map, is not drawn back to the velocity; without one the derivative fades in."""
    warm = flow_map(objective=objective, warm_start=10, tangent_warmup=None, same=0.0)
    assert [warm.share(step) for step in (10, 11, 5000)] == [1, 1, 1]
    batch = data(step=10)
    assert float(loss_of(warm, "student", batch)[1]["residual"]) < 1e-4
    assert [flow_map(tangent_warmup=None).share(step) for step in (0, 500, 4000)] == [0, 0.25, 1]
    assert [flow_map(warm_start=10, tangent_warmup=100).share(step) for step in (10, 60)] == [0, 0.5]


def shaken(objective: str) -> FlowMap:
    """A map by a random network, its own velocity, the same for every objective."""
    method = flow_map(Perceptron(seed=1), objective=objective, velocity="self", derivative="exact")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in weights_of(method):
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
    assert bool(torch.isfinite(loss_of(method, "student", data())[0]))
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
    assert method.options.needs == {"noise", "prompts"}
    assert float(loss_of(method, "student", toy_batch(32))[1]["residual"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "steps"), [("lagrangian", 700), ("semigroup", 200)])
def test_one_step_moves_from_the_teachers_mean_to_the_trajectories_end(objective: str, steps: int) -> None:
    """The Eulerian objective is MeanFlow's, and is shown to learn there."""
    options = FlowMap.Options.model_validate(
        {
            "guidance": 1.0,
            "tangent_warmup": 0,
            "source": "images",
            "objective": objective,
            "derivative": "difference",
        }
    )
    start, end = errors(from_the_teacher(FlowMap, options), steps)
    assert end < 0.5 * start, (start, end)
