"""Every option of the flow maps and of the reflow family: changed, and the number seen that it is to change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from flow_toy import MU, C, Velocity
from reflow_toy import Slimming, Straight
from torch import Tensor, nn

from stepdistill.data.pairs import PairCache
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import solve
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Method, PairOptions, Turn
from stepdistill.losses.fake_score import FakeTurnOptions
from stepdistill.losses.flow_maps import JumpOptions, MapOptions, PointOptions, TwoTimeOptions, WarmMapOptions
from stepdistill.losses.regression import WarmStartOptions
from stepdistill.methods.anyflow import AnyFlow
from stepdistill.methods.ayf import AYF
from stepdistill.methods.dmf import DMF
from stepdistill.methods.flow_map import FlowMap
from stepdistill.methods.freeflow import FreeFlow
from stepdistill.methods.instaflow import InstaFlow
from stepdistill.methods.mdt_dist import MDTDist
from stepdistill.methods.meanflow import MeanFlow
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.rfpp import RFPP
from stepdistill.methods.self_e import SelfE
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.methods.twinflow import TwinFlow
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    GaussianFlowMap,
    Perceptron,
    ToyChanges,
    ToyFamily,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

PATH = FlowPath()
SAID = [
    TwoTimeOptions,
    WarmMapOptions,
    MapOptions,
    PointOptions,
    JumpOptions,
    WarmStartOptions,
    PairOptions,
    FakeTurnOptions,
]
MAPS = [MeanFlow, MDTDist, SelfE, TwinFlow, AYF, AnyFlow, FlowMap, FreeFlow, DMF]
FLOWS = [Reflow, InstaFlow, RFPP, SlimFlow]
SAID += [kind.Options for kind in (*MAPS, *FLOWS)]
"""The classes that declare the options checked here; those of all methods have tests of their own."""

CHECKS: dict[str, Callable[[], None]] = {}


def name_of(options: type) -> str:
    return options.__qualname__.removesuffix(".Options")


def covers(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return add


def build(kind: type[Method], net: nn.Module | None = None, **options: Any) -> Any:
    """From the exact Gaussian teacher to a student that is its exact map, its straight flow, or ``net``."""
    maps = issubclass(kind.Options, TwoTimeOptions)
    net = net or (GaussianFlowMap(MU, C) if maps else Straight(PATH))
    output = "velocity" if maps or isinstance(net, Perceptron) else "x0"
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=Gaussian(PATH, 0.2, C))
    chosen = kind.Options.model_validate({"guidance": 1.0, **options})
    return kind(Copies(teacher, toy_student(net, PATH, output)), (1.0,), chosen)  # type: ignore[arg-type]


def batch_of(count: int = 256, step: int = 0) -> Batch:
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


class Calls:
    """The states, times and jumps' lengths of a network's calls."""

    def __init__(self, net: nn.Module) -> None:
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.gap: list[Tensor] = []
        net.register_forward_pre_hook(self._see)

    def _see(self, net: nn.Module, given: tuple[Tensor, Tensor, Condition]) -> None:
        self.x.append(given[0])
        self.t.append(given[1])
        self.gap.append(given[2].tensors.get("gap", torch.zeros_like(given[1])))


def value(method: Method, batch: Batch) -> float:
    with torch.no_grad():
        return float(loss_of(method, "student", batch)[0])


def logs(method: Method, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return loss_of(method, "student", batch)[1]


def logit_moments(times: Tensor) -> tuple[float, float]:
    return float(torch.logit(times).mean()), float(torch.logit(times).std())


@covers("WarmMapOptions.warm_times")
def warm_times() -> None:
    assert build(FlowMap, warm_times=(0.25, 0.75)).pair_times() == (0.75, 0.25)
    assert build(FlowMap, warm_times="all", pair_steps=4).pair_times() == (0.75, 0.5, 0.25)


def points(**options: Any) -> tuple[Tensor, Tensor]:
    batch = batch_of(1000)
    a, b = (batch.draws.uniform(name) for name in ("a", "b"))
    t, s = build(FlowMap, **options).points(batch, a, b)[2:4]
    return t, s


@covers("TwoTimeOptions.to_data", "PointOptions.same", "PointOptions.noise_share")
def shares() -> None:
    t, s = points(to_data=0.6, same=0.1, noise_share=0.3)
    for part, wanted in ((s == 0, 0.6), (s == t, 0.1), (t == 1, 0.3)):
        assert float(part.float().mean()) == pytest.approx(wanted, abs=0.05)


@covers("TwoTimeOptions.time_min")
def time_min() -> None:
    assert float(points(time_min=0.3)[0].min()) == pytest.approx(0.3)
    method = build(FlowMap, time_min=0.3, same=0.0, to_data=1.0, derivative="exact")
    read = Calls(method.teacher.denoiser.net)
    logs(method, batch_of())
    assert min(float(t.min()) for t in read.t) == pytest.approx(0.3)


@covers("MapOptions.derivative", "MapOptions.derivative_step")
def derivative() -> None:
    """Exact, the exact map is a zero and the teacher read once; a difference reads it at both ends of two steps."""
    chosen = {"objective": "eulerian", "same": 0.0, "to_data": 1.0, "noise_share": 1.0, "tangent_warmup": 0}
    for way, residual, times in (
        ("exact", (0, 1e-5), [1.0]),
        ("difference", (1e-5, 1e-3), [1.0, 0.95, 0.95, 0.9]),
    ):
        method = build(FlowMap, derivative=way, derivative_step=0.1, **chosen)
        read = Calls(method.teacher.denoiser.net)
        assert residual[0] <= float(logs(method, batch_of())["residual"]) < residual[1]
        assert [float(t[0]) for t in read.t] == pytest.approx(times)


@covers("PointOptions.source")
def source() -> None:
    images, a = torch.randn(8, *SHAPE), torch.full((8,), 0.5)
    plain = toy_batch(8, pairs=lambda z: MU + C * z, images=images)
    for name, wanted in (("images", images), ("pairs", plain.pairs and plain.pairs.x0), ("student", None)):
        method = build(FlowMap, source=name)
        assert method.options.needs == {"noise", "prompts"} | {name} - {"student"}
        if wanted is None:
            wanted = method.sampler().draw(method.student, plain.noise, Condition(), plain.fresh)
        torch.testing.assert_close(method.points(plain, a, a)[1], wanted)


@covers("JumpOptions.power", "JumpOptions.offset")
def weight() -> None:
    """|e|^2 / (|e|^2 + c)^p of one sample; p = 0 gives |e|^2."""
    chosen = {"objective": "semigroup", "first_leg": 0.1, "same": 0.0, "noise_share": 1.0}

    def loss(**options: float) -> float:
        return value(build(FlowMap, Perceptron(), **chosen, **options), batch_of(1))

    size = loss(power=0.0)
    assert size > 1e-3
    assert loss(power=1.0, offset=0.3) == pytest.approx(size / (size + 0.3), rel=1e-4)
    assert loss(power=0.5, offset=2.0) == pytest.approx(size / (size + 2.0) ** 0.5, rel=1e-4)


@covers("JumpOptions.tangent_warmup", "WarmStartOptions.warm_start")
def warm_up() -> None:
    shares = {
        (0, None): [0.0, 0.25, 1.0], (0, 1000): [0.0, 0.5, 1.0], (0, 0): [1.0] * 3, (100, None): [1.0] * 3,
    }  # fmt: skip
    for (warm, fade), wanted in shares.items():
        method = build(MeanFlow, warm_start=warm, tangent_warmup=fade)
        assert [method.share(warm + step) for step in (0, 500, 4000)] == wanted
    assert not logs(method, batch_of(8, 99))  # by regression alone
    assert "residual" in logs(method, batch_of(8, 100))
    assert {"pairs", "states"} <= method.options.needs


@covers("WarmStartOptions.warm_start_lr_ratio")
def warm_start_lr_ratio() -> None:
    """Annealed to 0 within the warm start, and 1 after it."""
    method = build(FreeFlow, warm_start=10, warm_start_lr_ratio=30)
    assert [method.lr_ratio(Turn("student", step)) for step in (0, 5, 10)] == pytest.approx([30, 15, 1])


@covers("WarmStartOptions.pair_distance")
def regression() -> None:
    """Data at 0: every mean velocity is the noise z, and a student that says 0 is off by it."""
    net = Perceptron()
    nn.init.zeros_(net.last.weight)
    nn.init.zeros_(net.last.bias)
    batch = toy_batch(64, pairs=lambda z: 0 * z)
    assert batch.pairs is not None and batch.pairs.noise is not None
    z = batch.pairs.noise
    for name, wanted in (("l2", z.square().mean()), ("l1", z.abs().mean())):
        method = build(FlowMap, net, warm_start=5, pair_distance=name)
        assert value(method, batch) == pytest.approx(float(wanted), rel=1e-4)


@covers("MeanFlow.time_mean", "MeanFlow.time_deviation")
def meanflow_times() -> None:
    method = build(
        MeanFlow,
        time_mean=0.5,
        time_deviation=0.7,
        same=0.0,
        to_data=0.0,
        noise_share=0.0,
        derivative="exact",
    )
    seen = Calls(method.student.net)
    logs(method, batch_of(1000))
    t, gap = seen.t[0], seen.gap[0]
    assert logit_moments(torch.cat([t, t - gap])) == pytest.approx((0.5, 0.7), abs=0.06)


@covers("DMF.velocity_mean", "DMF.start_mean", "DMF.end_mean", "DMF.time_deviation")
def dmf_times() -> None:
    """Of velocities the one law, of jumps the later and the earlier of two others."""
    chosen = {"velocity_mean": 0.3, "start_mean": 1.5, "end_mean": -1.5, "time_deviation": 0.2}
    method = build(DMF, to_data=0.0, noise_share=0.0, derivative="exact", **chosen)
    seen = Calls(method.student.net)
    logs(method, batch_of(1000))
    jumps = [(t, gap) for t, gap in zip(seen.t, seen.gap, strict=True) if len(t) == 1000]
    (r, still) = next((t, gap) for t, gap in jumps if not gap.any())
    t, gap = next((t, gap) for t, gap in jumps if gap.any())
    assert not still.any()
    for times, mean in ((r, 0.3), (t, 1.5), (t - gap, -1.5)):
        assert logit_moments(times) == pytest.approx((mean, 0.2), abs=0.03)


@covers("DMF.offset", "DMF.adaptive", "DMF.same")
def dmf_loss() -> None:
    """log(|e|^2 e^-w + c) + w with the mean square; at s = t alone both halves are of velocities."""
    error, t, s = torch.randn(16, *SHAPE), torch.rand(16), torch.zeros(16)
    size = error.square().flatten(1).mean(1)
    for c in (0.01, 2.0):
        method = build(DMF, offset=c)
        with torch.no_grad():
            method.log_variance.last.bias.fill_(0.7)
        wanted = (size + c * math.exp(0.7)).log().mean()
        torch.testing.assert_close(method.distance(error, t, s), wanted)
    plain = build(DMF, adaptive=False)
    torch.testing.assert_close(plain.distance(error, t, s), (size + 0.01).log().mean())
    assert plain.trained()["student"].extra is None
    method = build(DMF, same=1.0, derivative="difference")
    seen = Calls(method.student.net)
    logs(method, batch_of(64))
    assert not torch.cat(seen.gap).any()


@covers("DMF.second_time", "TwoTimeOptions.second_time")
def second_time() -> None:
    """How the student was asked to take its second time."""
    for kind, options, wanted in (
        (DMF, {}, "late_blocks"),
        (DMF, {"second_time": "embedded"}, "embedded"),
        (MeanFlow, {}, "embedded"),
        (MeanFlow, {"second_time": "late_blocks"}, "late_blocks"),
        (MeanFlow, {"second_time": "stock"}, "stock"),
    ):
        asked: list[str] = []

        class Asked(ToyChanges):
            def second_time(self, net: nn.Module, asked: list[str] = asked) -> nn.Module:
                asked.append("embedded")
                return super().second_time(net)

            def late_blocks(self, net: nn.Module, asked: list[str] = asked) -> nn.Module:
                asked.append("late_blocks")
                return super().second_time(net)

            def any_step(self, net: nn.Module, asked: list[str] = asked) -> nn.Module:
                asked.append("stock")
                return super().second_time(net)

        student = toy_student(Perceptron(), PATH, "velocity")
        student.family = ToyFamily()
        student.family.changes = Asked()  # type: ignore[misc]
        teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH)
        kind(Copies(teacher, student), (1.0,), kind.Options.model_validate(options))  # type: ignore[arg-type]
        assert asked == [wanted]


@covers("MDTDist.time_mean", "MDTDist.time_deviation")
def times_of_both_terms() -> None:
    """Those of noised latents, and those at which the student's own samples are noised anew."""
    method = build(MDTDist, time_mean=-0.7, time_deviation=0.3, noise_share=0.0, time_min=0.01)
    read = Calls(method.teacher.denoiser.net)
    logs(method, batch_of(2000))
    assert len(read.t) >= 2
    for t in (read.t[0], read.t[-1]):
        mean, deviation = logit_moments(t)
        assert mean == pytest.approx(-0.7, abs=0.05) and deviation == pytest.approx(0.3, abs=0.05)


@covers("MDTDist.same", "MDTDist.to_data", "MDTDist.power")
def mdt_shares_and_weight() -> None:
    options = MDTDist.Options()
    assert (options.same, options.to_data, options.power) == (0.0, 1.0, 0.0)
    method, batch = build(MDTDist), batch_of(64)
    a, b = (batch.draws.uniform(name) for name in ("a", "b"))
    assert float(method.points(batch, a, b)[3].max()) == 0.0
    half = build(MDTDist, same=0.5)
    t, s = half.points(batch_of(1000), *(batch_of(1000).draws.uniform(name) for name in ("a", "b")))[2:4]
    assert float((t == s).float().mean()) == pytest.approx(0.5, abs=0.05)
    plain, weighed = (
        value(build(MDTDist, Perceptron(), power=p, distillation_weight=0.0), batch_of(1)) for p in (0, 1)
    )
    assert weighed == pytest.approx(2 * plain / (2 * plain + 0.1) / 2, rel=1e-4)


@covers("MDTDist.normalised", "MDTDist.distillation_weight", "MDTDist.matching_alone")
def mdt_terms() -> None:
    """At the exact map: a zero of both terms, but for the division by the derivative's length."""
    exact = logs(build(MDTDist, normalised=False, derivative="exact", tangent_warmup=0), batch_of())
    assert float(exact["residual"]) < 1e-4 and float(exact["field"]) < 1e-4
    assert float(logs(build(MDTDist, derivative="exact", tangent_warmup=0), batch_of())["residual"]) > 1e-3
    assert "field" not in logs(build(MDTDist, distillation_weight=0.0), batch_of())
    assert "field" not in logs(build(MDTDist, matching_alone=1), batch_of())


@covers("SelfE.same", "SelfE.to_data", "SelfE.noise_share", "SelfE.coupled")
def self_e_points() -> None:
    options = SelfE.Options()
    assert (options.same, options.to_data, options.noise_share, options.coupled) == (0.5, 0.0, 0.0, False)
    batch, a = batch_of(1000), batch_of(1000).draws.uniform("a")
    for chosen, wanted in (({}, (0.5, 0.0, 0.0)), ({"same": 0.2, "to_data": 0.3, "noise_share": 0.4},) * 2):
        t, s = build(SelfE, **chosen).points(batch, a, a / 2)[2:4]
        shares = wanted if isinstance(wanted, tuple) else tuple(wanted.values())
        for part, share in zip((s == t, s == 0, t == 1), shares, strict=True):
            assert float(part.float().mean()) == pytest.approx(share, abs=0.05)
    assert batch.pairs is not None and batch.pairs.noise is not None
    for coupled in (False, True):
        seen = Calls((method := build(SelfE, coupled=coupled)).student.net)
        logs(method, batch)
        line = PATH.noised(batch.pairs.x0, batch.pairs.noise, seen.t[0])
        assert torch.equal(seen.x[0], line) == coupled


@covers(
    "SelfE.evaluation", "SelfE.largest_weight", "SelfE.renorm", "SelfE.auxiliary_after", "SelfE.auxiliary"
)
def self_e_target() -> None:
    """At lambda = 0 the target is the data; evaluated, the classifier score and the twin's part count as asked."""
    x, s = torch.randn(8, *SHAPE), torch.full((8,), 0.5)

    def moved(**options: float) -> Tensor:
        return build(SelfE, GaussianFlowMap(1.5, C), **options).evaluated(x, x, s, Condition(), 3) - x

    torch.testing.assert_close(moved(evaluation=2.0), 2 * moved())
    torch.testing.assert_close(moved(auxiliary_after=4), moved())
    own = moved(auxiliary_after=3) - moved()
    assert float(own.abs().mean()) > 0.01
    torch.testing.assert_close(moved(auxiliary_after=3, auxiliary=3.0) - moved(), 3 * own)
    method, t = build(SelfE, largest_weight=0.0, renorm=False), torch.ones(8)
    assert torch.equal(method.target(x, x + 1, method.weight(t, s)), x)
    other = build(SelfE).target(x, x + 1, t).flatten(1).norm(dim=1)
    torch.testing.assert_close(other, x.flatten(1).norm(dim=1))


@covers("TwinFlow.parts", "TwinFlow.velocity")
def twin_parts() -> None:
    """Which part is asked for says who is called with what."""
    for parts, longest, own in (((1, 0, 0, 0), 1.0, 1), ((0, 1, 0, 0), 0.05, 0), ((0, 0, 0, 1), 1.0, 1)):
        method = build(TwinFlow, parts=parts, target_decay=0.0)
        seen = Calls(method.student.net)
        logs(method, batch_of(64))
        assert float(seen.gap[0].max()) <= longest + 1e-6
        assert sum(float(gap.min()) < -0.5 for gap in seen.gap) == own
    for velocity, calls in (("data", 0), ("teacher", 2)):
        method = build(TwinFlow, parts=(1, 0, 0, 0), velocity=velocity)
        read = Calls(method.teacher.denoiser.net)
        logs(method, batch_of(64))
        assert len(read.t) == calls


@covers("TwinFlow.order", "TwinFlow.target_decay", "TwinFlow.rectify")
def twin_target() -> None:
    method = build(TwinFlow, parts=(0, 0, 1, 0), order=3, target_decay=0.0)
    seen = Calls(method.student.net)
    assert method.target.denoiser is method.student
    logs(method, batch_of(64))
    assert len(seen.t) == 1 + 3
    method = build(TwinFlow, target_decay=0.9)
    with torch.no_grad():
        method.student.net.mean += 1.0
    method.after_step(Turn("student", 0))
    assert float(method.target.denoiser.net.mean.detach()) == pytest.approx(MU + 0.1, abs=1e-5)
    none, half, whole = (
        value(build(TwinFlow, GaussianFlowMap(1.5, C), parts=(1, 0, 0, 0), rectify=weight), batch_of(64))
        for weight in (0.0, 0.5, 1.0)
    )
    assert half > none and whole - none == pytest.approx(2 * (half - none), rel=1e-3)


@covers("AYF.objective", "AYF.tangent_warmup", "AYF.largest_share", "AYF.tangent_offset")
def ayf_tangents() -> None:
    """Where the teacher is read says which equation; the share rises; one sample's loss is its length's."""
    chosen = {"same": 0.0, "to_data": 0.0, "noise_share": 1.0, "derivative": "exact"}
    for name in ("eulerian", "lagrangian"):
        method = build(AYF, objective=name, **chosen)
        read, seen = Calls(method.teacher.denoiser.net), Calls(method.student.net)
        logs(method, batch_of(64))
        wanted = seen.t[0] if name == "eulerian" else seen.t[0] - seen.gap[0]
        torch.testing.assert_close(read.t[0], wanted)
    method = build(AYF, tangent_warmup=100, largest_share=0.8)
    assert [method.share(step) for step in (0, 50, 200)] == pytest.approx([0, 0.4, 0.8])
    for offset in (0.1, 3.0):
        method = build(AYF, Perceptron(), tangent_offset=offset, tangent_warmup=0, **chosen)
        length = math.sqrt(2) * float(logs(method, batch_of(1))["residual"])
        assert value(method, batch_of(1)) == pytest.approx((length / (length + offset)) ** 2, rel=1e-4)


@covers("AYF.autoguidance")
def autoguidance() -> None:
    """Away from a weaker teacher, by what lies between the two; nothing where there is none."""
    x, t = torch.randn(8, *SHAPE), torch.full((8,), 0.6)
    weak = ToyTeacher(Gaussian(PATH, 0.5, C), PATH)
    for scale in (1.0, 2.0, 3.5):
        method = build(AYF, autoguidance=scale)
        plain = method.velocity(x, t, Condition())
        method.roles.route = replace(method.roles.route, weak=weak)
        other = weak.predict(x, t, Condition()).velocity
        guided = method.velocity(x, t, Condition())
        torch.testing.assert_close(guided, scale * plain + (1 - scale) * other)


@covers("AYF.time_mean", "AYF.time_deviation")
def ayf_times() -> None:
    shares = {"same": 0.0, "to_data": 0.0, "noise_share": 0.0, "derivative": "exact"}
    method = build(AYF, time_mean=0.5, time_deviation=0.7, **shares)
    seen = Calls(method.student.net)
    logs(method, batch_of(1000))
    t = next(t for t, gap in zip(seen.t, seen.gap, strict=True) if float(gap.max()) > 0)
    gap = next(gap for gap in seen.gap if float(gap.max()) > 0)
    assert logit_moments(torch.cat([t, t - gap])) == pytest.approx((0.5, 0.7), abs=0.06)


@covers("AnyFlow.same", "AnyFlow.noise_share", "AnyFlow.power", "AnyFlow.offset", "AnyFlow.derivative")
def anyflow_map() -> None:
    """Its defaults are the paper's; each sample's loss is over its own value, and derivatives are differences."""
    options = AnyFlow.Options()
    assert (options.same, options.noise_share, options.power, options.offset) == (0.5, 0.0, 1.0, 1e-5)
    assert (
        build(AnyFlow).derivative.way == "difference"
        and build(AnyFlow, derivative="exact").derivative.way == "exact"
    )
    found = [
        float(build(AnyFlow, Perceptron(), power=p, **ALONE).of_map(batch_of(1), 5000)[0]) for p in (0.0, 1.0)
    ]
    assert found[1] == pytest.approx(found[0] / (found[0] + 1e-5), rel=1e-4)
    half = float(build(AnyFlow, Perceptron(), offset=found[0], **ALONE).of_map(batch_of(1), 5000)[0])
    assert half == pytest.approx(0.5, rel=1e-4)
    for share in (0.2, 0.7):
        method = build(AnyFlow, same=share, to_data=0.0, noise_share=0.3, derivative="exact")
        seen = Calls(method.student.net)
        method.of_map(batch_of(1000), 0)
        assert float((seen.gap[-1] == 0).float().mean()) == pytest.approx(share, abs=0.05)
        assert float((seen.t[-1] == 1).float().mean()) == pytest.approx(0.3, abs=0.05)


ALONE = {"same": 0.0, "to_data": 0.0, "noise_share": 1.0}


@covers("AnyFlow.time_shift")
def anyflow_shift() -> None:
    """The later of two uniform times, u, is at k u / (1 + (k - 1) u)."""
    for shift in (1.0, 5.0):
        method = build(AnyFlow, time_shift=shift, same=0.0, to_data=0.0, derivative="exact")
        seen, batch = Calls(method.student.net), batch_of(64)
        method.of_map(batch, 0)
        u = torch.maximum(*(batch.draws.uniform(name, method.least, 1.0) for name in ("a", "b")))
        torch.testing.assert_close(seen.t[-1], shift * u / (1 + (shift - 1) * u))


@covers("AnyFlow.map_updates", "AnyFlow.map_lr_ratio", "AnyFlow.counts", "AnyFlow.map_weight")
def anyflow_stages() -> None:
    method = build(AnyFlow, map_updates=3, map_lr_ratio=7.0, counts=(50,))
    assert "".join(method.turn(step).network[0] for step in range(7)) == "sss" + "fsfs"
    assert [method.lr_ratio(Turn("student", step)) for step in (2, 4)] == [7.0, 1.0]
    lengths = []
    for step in range(8):
        seen = Calls(method.student.net)
        method.rollout(batch_of(2, step))
        lengths.append(min(float(gap[0]) for gap in seen.gap))
    assert max(lengths) == pytest.approx(1 / 50, abs=1e-5)
    for weight in (0.0, 1.0):
        assert ("residual" in logs(build(AnyFlow, map_weight=weight), batch_of(8))) == (weight > 0)


@covers("AnyFlow.score_guidance")
def anyflow_scores() -> None:
    """A fake network of the guided mean leaves no field."""
    for options, scale in (({"guidance": 3.0}, 3.0), ({"guidance": 3.0, "score_guidance": 1.5}, 1.5)):
        method = build(AnyFlow, **options)
        assert method.options.score_scale == scale  # what a run's watch compares at
        method.fake.net, method.fake.output = Gaussian(PATH, 0.2 + scale * (MU - 0.2), C), "x0"
        assert float(method.field(torch.randn(8, *SHAPE), batch_of(8)).abs().max()) < 1e-4


@covers(
    "MeanFlow.guidance",
    "AYF.guidance",
    "DMF.guidance",
    "AnyFlow.guidance",
    "MDTDist.guidance",
    "FlowMap.guidance",
    "FreeFlow.guidance",
)
def guidance() -> None:
    """Of two Gaussians of one deviation the guided velocity is that of the mean m0 + g (m - m0)."""
    x, t = torch.randn(8, *SHAPE), torch.full((8,), 0.6)
    wanted = ToyTeacher(Gaussian(PATH, 0.2 + 3 * (MU - 0.2), C), PATH).predict(x, t, Condition()).velocity
    for kind in (MeanFlow, AYF, DMF, AnyFlow, MDTDist, FlowMap, FreeFlow):
        torch.testing.assert_close(build(kind, guidance=3.0).velocity(x, t, Condition()), wanted)


@covers("FlowMap.objective", "FlowMap.velocity")
def objective() -> None:
    """The Eulerian equation reads the velocity where a jump starts, the Lagrangian where it ends, the semigroup not."""
    chosen = {"same": 0.0, "to_data": 0.0, "noise_share": 1.0, "derivative": "exact"}
    for name, own in (
        ("eulerian", 0),
        ("lagrangian", 0),
        ("semigroup", 0),
        ("eulerian", 1),
        ("lagrangian", 1),
    ):
        method = build(FlowMap, objective=name, velocity="self" if own else "teacher", **chosen)
        read, seen = Calls(method.teacher.denoiser.net), Calls(method.student.net)
        logs(method, batch_of(64))
        if own or name == "semigroup":
            assert not read.t
        else:
            wanted = seen.t[0] if name == "eulerian" else seen.t[0] - seen.gap[0]
            torch.testing.assert_close(read.t[0], wanted)


@covers("FlowMap.diagonal")
def diagonal() -> None:
    batch = batch_of(8)
    assert batch.pairs is not None
    x0, eps, t = batch.pairs.x0, batch.noise, torch.full((8,), 0.3)
    x = PATH.noised(x0, eps, t)
    data = build(FlowMap, diagonal="data").diagonal(x, x0, t, Condition())
    torch.testing.assert_close(data, eps - x0, atol=1e-5, rtol=1e-4)
    method = build(FlowMap)
    torch.testing.assert_close(method.diagonal(x, x0, t, Condition()), method.velocity(x, t, Condition()))


@covers("FlowMap.middle", "FlowMap.first_leg")
def middle() -> None:
    """Where the student is called for the second of the semigroup's jumps."""
    batch = batch_of(64)
    uniform = batch.draws.uniform("middle")
    for options, wanted in (
        ({}, lambda t, s: (t + s) / 2),
        ({"middle": "uniform"}, lambda t, s: uniform * t + (1 - uniform) * s),
        ({"first_leg": 0.05}, lambda t, s: torch.maximum(t - 0.05, s)),
    ):
        method = build(FlowMap, objective="semigroup", same=0.0, to_data=0.0, noise_share=1.0, **options)
        seen = Calls(method.student.net)
        logs(method, batch)
        torch.testing.assert_close(seen.t[-1], wanted(seen.t[0], seen.t[0] - seen.gap[0]))


def freeflow(**options: Any) -> tuple[FreeFlow, Calls, Calls]:
    method = build(FreeFlow, **{"to_data": 0.0, "derivative": "exact", **options})
    return method, Calls(method.student.net), Calls(method.teacher.denoiser.net)


@covers("FreeFlow.end_mean", "FreeFlow.end_deviation", "FreeFlow.to_data")
def freeflow_ends() -> None:
    method, seen, _ = freeflow(correction_share=0.0, end_mean=0.4, end_deviation=0.6)
    logs(method, batch_of(1000))
    assert logit_moments(1 - seen.gap[0]) == pytest.approx((0.4, 0.6), abs=0.06)
    method, seen, _ = freeflow(correction_share=0.0, to_data=0.5)
    logs(
        method, batch_of(1000)
    )  # half of the half is closed at 0, the other half ends where the teacher is read
    for end in (1.0, 1 - method.least):
        assert float((seen.gap[0] - end).abs().lt(1e-6).float().mean()) == pytest.approx(0.25, abs=0.05)


@covers("FreeFlow.power", "FreeFlow.offset")
def freeflow_weight() -> None:
    """|e|^2 / (|e|^2 + c)^p / 2 of one sample, |.|^2 its mean square."""

    def loss(**options: float) -> float:
        return value(
            build(FreeFlow, GaussianFlowMap(MU + 0.3, C), correction_share=0.0, **options), batch_of(1)
        )

    size = 2 * loss(power=0.0)
    assert size > 1e-3
    assert loss(power=1.0, offset=0.3) == pytest.approx(0.5 * size / (size + 0.3), rel=1e-4)
    assert loss(power=0.5, offset=2.0) == pytest.approx(0.5 * size / (size + 2.0) ** 0.5, rel=1e-4)


@covers("FreeFlow.correction", "FreeFlow.correction_share")
def correction() -> None:
    method, seen, _ = freeflow(correction=2.5, correction_share=0.3)
    assert float(logs(method, batch_of(1000))["lambda"]) == pytest.approx(2.5)
    assert len(seen.t[0]) / 1000 == pytest.approx(0.7, abs=0.05)  # the prediction's samples
    method.balance.see(torch.ones(4), 2 * torch.ones(4))
    method.balance.update()
    assert float(method.balance.ratio) < 1
    assert float(logs(method, batch_of(8))["lambda"]) == pytest.approx(2.5 * float(method.balance.ratio))


@covers("FreeFlow.correction_mean", "FreeFlow.correction_deviation")
def correction_times() -> None:
    method, _, read = freeflow(correction_share=1.0, correction_mean=-0.3, correction_deviation=0.8)
    logs(method, batch_of(1000))
    assert logit_moments(read.t[0]) == pytest.approx((-0.3, 0.8), abs=0.06)


@covers("FreeFlow.correction_guidance", "FreeFlow.correction_interval")
def correction_guidance() -> None:
    """Guided inside the interval by its own scale: there a fake network of the guided mean leaves no field."""
    x, one = torch.randn(8, *SHAPE), torch.ones(8)
    method = build(FreeFlow, guidance=3.0, correction_guidance=2.0, correction_interval=(0.4, 0.6))
    for r, scale in ((0.3, 1.0), (0.5, 2.0), (0.7, 1.0)):
        method.fake.net = Velocity(Gaussian(PATH, 0.2 + scale * (MU - 0.2), C)).requires_grad_(False)
        method.fake.output = "velocity"
        assert float(method.field(x, r * one, x.flip(0), Condition())[0].abs().max()) < 1e-4


@covers("FakeTurnOptions.fake_updates", "FakeTurnOptions.fake_warm_start", "FakeTurnOptions.fake_lr_ratio")
def fake_turns() -> None:
    method = build(FreeFlow, fake_updates=2, fake_warm_start=3, fake_lr_ratio=7.0, warm_start=2)
    assert "".join(method.turn(step).network[0] for step in range(12)) == "ss" + "fff" + "ffs" * 2 + "f"
    assert [method.lr_ratio(Turn(turn, 5)) for turn in ("student", "fake")] == [1.0, 7.0]


@covers("FakeTurnOptions.fake_loss")
def fake_loss() -> None:
    """A fake network whose x0 is off by 0.5 is off by 0.5 / t in its velocity."""
    batch = batch_of(1)
    t = float(batch.draws.uniform("fake t"))
    for name, wanted in (("x0", 0.25), ("output", 0.25 / t**2)):
        method = build(FreeFlow, fake_loss=name)
        said = Affine(0.0, 0.0)
        said.shift = nn.Parameter(MU + C * batch.noise + 0.5)
        method.fake.net, method.fake.output = Velocity(said), "velocity"
        assert float(loss_of(method, "fake", batch)[0].detach()) == pytest.approx(wanted, rel=1e-3)


@covers("Reflow.reflow_updates", "Reflow.distance", "InstaFlow.reflow_updates", "InstaFlow.distance")
@covers("InstaFlow.l2_updates", "InstaFlow.rounds", "SlimFlow.reflow_updates", "SlimFlow.distance")
def stages() -> None:
    """An x0 that is off by 0.5 is at a squared distance of 0.25 and an absolute one of 0.5."""
    cases: list[tuple[type[Method], dict[str, Any], list[float | None]]] = [
        (Reflow, {"reflow_updates": 2, "distance": "l1"}, [None, None, 0.5]),
        (SlimFlow, {"reflow_updates": 1, "distance": "l1", "guide_weight": 0.0}, [None, 0.5]),
        (
            InstaFlow,
            {"rounds": 2, "reflow_updates": 1, "l2_updates": 1, "distance": "l1", "own": 0.0},
            [None, None, 0.25, 0.5],
        ),
    ]
    for kind, options, wanted in cases:
        method = build(kind, Straight(PATH, 0.5), **options)
        for step, loss in enumerate(wanted):
            said = logs(method, batch_of(16, step))
            assert ("reflow" in said) == (loss is None)
            assert loss is None or float(said["distillation"]) == pytest.approx(loss, rel=1e-4)
            method.after_step(method.turn(step))


@covers("Reflow.t_min", "InstaFlow.t_min", "SlimFlow.t_min", "RFPP.t_min")
def least_times() -> None:
    for kind in (Reflow, InstaFlow, SlimFlow, RFPP):
        method = build(kind, t_min=0.4)
        seen = Calls(method.student.net)
        logs(method, batch_of())
        assert 0.4 <= float(seen.t[0].min()) < 0.42
        assert float(seen.t[0].mean()) == pytest.approx(0.7, abs=0.04)  # either law is even about the middle


@covers("Reflow.fresh", "InstaFlow.own", "Reflow.flow_steps", "InstaFlow.flow_steps")
def own_pairs() -> None:
    """The share of batches that start from this step's noise, and how often their flow is called."""
    for kind, name in ((Reflow, "fresh"), (InstaFlow, "own")):
        method = build(kind, **{name: 0.3, "reflow_updates": 0, "flow_steps": 7})
        seen, flow = Calls(method.student.net), Calls(method.flow.net)
        own = 0
        for step in range(60):
            batch = batch_of(2, step)
            logs(method, batch)
            own += torch.equal(seen.x[-1], batch.noise)
        assert own / 60 == pytest.approx(0.3, abs=0.15)
        assert len(flow.t) == 7 * own
        drawn = [Draws(0, step, 0, 2).shared_integer(name, 1000) for step in range(6000)]
        for share, wanted in ((0.0, {0: False}), (0.5, {499: True, 500: False}), (1.0, {999: True})):
            method = build(kind, **{name: share, "reflow_updates": 0, "flow_steps": 1})
            seen = Calls(method.student.net)
            for number, said in wanted.items():
                for step in [step for step, value in enumerate(drawn) if value == number][:4]:
                    batch = batch_of(2, step)
                    logs(method, batch)
                    assert torch.equal(seen.x[-1], batch.noise) == said, (share, number)


@covers("RFPP.sharpness")
def sharpness() -> None:
    """The share of times below 0.1 is 1/2 - sinh(0.4 a) / (2 sinh(a / 2))."""
    for a in (1.0, 8.0):
        times = build(RFPP, sharpness=a).times_of(batch_of(1000))
        wanted = 0.5 - math.sinh(0.4 * a) / (2 * math.sinh(a / 2))
        assert float((times < 0.1).float().mean()) == pytest.approx(wanted, abs=0.035)


@covers("RFPP.clean", "RFPP.feature_time")
def clean() -> None:
    x = torch.randn(4, *SHAPE)
    teacher = ToyTeacher(Perceptron(), PATH, "velocity")
    student = toy_student(Perceptron(), PATH, "velocity")
    method = RFPP(Copies(teacher, student), (1.0,), RFPP.Options(clean="features", feature_time=0.3))
    read = Calls(teacher.denoiser.net)
    features = method.seen(x, Condition())
    assert features.shape == (4, 32, 1, 1) and [float(t[0]) for t in read.t] == pytest.approx([0.3])
    torch.testing.assert_close(read.x[0], 0.7 * x)
    assert build(RFPP, clean="latents").seen(x, Condition()) is x


@covers("RFPP.clean_weight", "RFPP.clean_over_t")
def clean_weight() -> None:
    batch = batch_of(64)
    terms = logs(build(RFPP, Straight(PATH, 0.5)), batch)
    for weight in (0.0, 3.0):
        method = build(RFPP, Straight(PATH, 0.5), clean_weight=weight)
        wanted = float(terms["velocity"] + weight * terms["clean"])
        assert value(method, batch) == pytest.approx(wanted, rel=1e-5)
    size = ((2 * 0.25 + 0.00108**2) ** 0.5 - 0.00108) / 2  # an x0 off by 0.5, by the pseudo-Huber distance
    over = logs(build(RFPP, Straight(PATH, 0.5), clean_over_t=False), batch)["clean"]
    assert float(over) == pytest.approx(size, rel=1e-4)
    times = build(RFPP).times_of(batch)
    assert float(terms["clean"]) == pytest.approx(size * float((1 / times).mean()), rel=1e-3)


@covers("RFPP.pair_steps", "RFPP.pair_solver")
def rfpp_pairs() -> None:
    options = RFPP.Options()
    assert (options.pair_steps, options.pair_solver) == (18, "heun")


@covers("SlimFlow.width", "SlimFlow.depth")
def slimmer() -> None:
    asked: list[tuple[float, float]] = []

    class Asked(Slimming):  # type: ignore[misc]
        def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
            asked.append((width, depth))
            return super().slimmer(net, width, depth)  # type: ignore[no-any-return]

    class Family(ToyFamily):  # type: ignore[misc]
        changes = Asked()

    for width, depth in ((0.25, 1.0), (1.0, 0.5), (1.0, 1.0)):
        student = toy_student(Perceptron(), PATH, "velocity")
        student.family = Family()
        options = SlimFlow.Options(width=width, depth=depth)
        SlimFlow(Copies(ToyTeacher(Perceptron(), PATH, "velocity"), student), (1.0,), options)
        assert student.net.get_submodule("first").out_features == 64 * width
    assert asked == [(0.25, 1.0), (1.0, 0.5)]


@covers("SlimFlow.anneal", "SlimFlow.anneal_schedule")
def anneal() -> None:
    for schedule, quarter in (("linear", 0.75), ("cosine", 0.5 + 0.5 * math.cos(math.pi / 4))):
        method = build(SlimFlow, reflow_updates=100, anneal=0.4, anneal_schedule=schedule)
        assert [method.beta(step) for step in (0, 10, 20, 40, 60)] == pytest.approx([1, quarter, 0.5, 0, 0])
    assert [build(SlimFlow, reflow_updates=10, anneal=0.0).beta(step) for step in (0, 1)] == [1, 0]


@covers("SlimFlow.guide_weight", "SlimFlow.guide_times")
def guide() -> None:
    batch = batch_of(64)
    method = build(SlimFlow, reflow_updates=0, guide_weight=3.0, guide_times=(0.3, 0.4))
    with torch.no_grad():
        method.student.net.error.fill_(0.5)
    flow = Calls(method.flow.net)
    terms = logs(method, batch)
    assert float(flow.t[0].min()) >= 0.3 and float(flow.t[0].max()) <= 0.4
    assert value(method, batch) == pytest.approx(float(terms["distillation"] + 3 * terms["guide"]), rel=1e-5)


@pytest.mark.parametrize("kind", [*MAPS, *FLOWS])
def test_how_the_students_of_the_family_are_drawn(kind: type[Method]) -> None:
    """Without fresh noise, from each time to the next; flow maps are told where a jump ends. A flow that is kept for
    its samples is not trained."""
    method = build(kind)
    assert method.sampler() == Sampler((1.0,), False, two_times=issubclass(kind.Options, TwoTimeOptions))
    if kind in (Reflow, InstaFlow, SlimFlow):
        assert method.flow is not method.student and not any(
            p.requires_grad for p in method.flow.net.parameters()
        )


CACHED = {"Reflow.guidance", "InstaFlow.guidance", "PairOptions.pairs", "PairOptions.pair_steps"}
CACHED |= {"PairOptions.pair_solver"}
"""Options of the pairs that the cache draws."""


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_pairs_are_drawn_as_they_were_asked_for(
    solver: str, tmp_path: File, teacher_of: Callable[[str], PipelineTeacher]
) -> None:
    teacher = teacher_of("sd")
    options = Reflow.Options.model_validate(
        {"pairs": 3, "pair_steps": 2, "pair_solver": solver, "guidance": 2.0}
    )
    cond = teacher.codec.encode(["a fish"])
    cache = PairCache(tmp_path, teacher, ["a fish"], options, 0)
    cache.make(lambda index: cond.repeat(len(index)))
    rows = torch.arange(3)
    wanted = solve(
        lambda x, t: teacher.predict(x, t, cond.repeat(3), guidance=2.0),
        cache.noise(rows),
        (1.0, 0.5, 0.0),
        solver,
    )
    assert len(cache.prompt_index) == 3
    torch.testing.assert_close(cache.clean(rows), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()), ids=lambda check: check.__name__)
def test_an_option_changes_what_it_is_to_change(check: Callable[[], None]) -> None:
    check()


def test_no_option_is_left_out() -> None:
    declared = {
        f"{name_of(kind)}.{name}"
        for kind in SAID
        for name in kind.__annotations__
        if name in kind.model_fields
    }
    assert set(CHECKS) | CACHED == declared
