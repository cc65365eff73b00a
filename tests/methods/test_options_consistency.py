"""Every option of the consistency family: changed, it moves its number; and no option of any method is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import test_options_flow
import test_options_further
import test_options_matching
import test_options_onpolicy
import torch
from matching_toy import full_batch
from table_toy import TABLE

from stepdistill.diffusion.path import FlowPath, Path
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.losses.contract import MethodOptions, PairOptions, Turn
from stepdistill.methods import find_method
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.lcm import LCM
from stepdistill.methods.pcm import PCM
from stepdistill.methods.rcm import RCM
from stepdistill.methods.scm import SCM
from stepdistill.methods.tbcm import TBCM
from stepdistill.methods.tcd import TCD
from stepdistill.methods.tscd import TSCD
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import schedule_times
from stepdistill.system.shipped import method_names
from stepdistill.testing.toys import (
    Perceptron,
    ToyFamily,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

FAMILY = [LCM, Consistency, SCM, RCM, TBCM, TCD, PCM, TSCD]
OF_PAIRS = set(PairOptions.model_fields) - set(MethodOptions.model_fields)
ELSEWHERE = OF_PAIRS | {"guidance_2", "guidance_interval", "guidance_rescale", "fake_lora_rank"}
"""Options that these methods do not read: the cache of pairs does (tests/methods/test_options_flow.py), and the teacher
(tests/losses/test_terms.py: guidance_is_off_outside_its_interval, rescaled_guidance_is_the_teachers;
tests/families/test_wan_2_2.py); of adapters alone (tests/networks/test_roles.py)."""

Number = Callable[[Any], Any]


class TakesGuidance(NetworkChanges):
    def guidance_input(self, net: torch.nn.Module) -> torch.nn.Module:
        return net


class Told(ToyFamily):
    """Networks that take guidance as an input, as Stable Diffusion's can."""

    changes = TakesGuidance()


def made(kind: Any, path: Path | None = None, **options: Any) -> Any:
    """A method between perceptrons, its student one step away from a target that follows it; guided and not."""
    path = path or FlowPath(options.get("shift", 1.0))  # as PipelineTeacher does
    teacher = ToyTeacher(Perceptron(), path, "v", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), path, "v")
    student.family = Told(path)
    chosen = {
        "guidance": 2.0,
        **({"tangent_warmup": 0, "derivative": "exact"} if kind in (SCM, RCM) else {}),
        **options,
    }
    method = kind(Copies(teacher, student), schedule_times(path, 2), kind.Options(**chosen))
    with torch.no_grad():
        for parameter in method.student.net.parameters():
            parameter *= 1.1
        for parameter in modules_of(method).get("fake", torch.nn.Module()).parameters():
            parameter *= 1.1
    method.after_step(method.turn(0))
    return method


# --- the numbers -------------------------------------------------------------------------------------------------


def loss(method: Any) -> float:
    step = next(step for step in range(7, 40) if method.turn(step).network == "student")
    return float(loss_of(method, "student", full_batch(step=step))[0].detach())


def loss_of_fake(method: Any) -> float:
    return float(loss_of(method, "fake", full_batch(step=4))[0].detach())


def target(method: Any) -> float:
    """How far the target is behind the student, over the student's step: the decay."""
    now, then = (net.get_parameter("last.bias") for net in (method.student.net, method.target.denoiser.net))
    return float(((now - then).abs().sum() / (now - now / 1.1).abs().sum()).detach())


def needs(method: Any) -> frozenset[str]:
    return method.options.needs


def networks(method: Any) -> list[str]:
    return sorted(modules_of(method))


def turns(method: Any) -> str:
    return "".join(method.turn(step).network[0] for step in range(40))


def rates(method: Any) -> list[float]:
    return [method.lr_ratio(Turn(turn, 7)) for turn in modules_of(method)]


def drawing(method: Any) -> Any:
    sampler = method.sampler()
    return sampler.renoise, sampler.grid, sampler.guidance, sampler.gamma, sampler.call_arguments()


def drawn_times(method: Any) -> tuple[float, ...]:
    return on_stock_grid(method.sampler(), method.student.path, None, 4).times


def levels(method: Any) -> list[float]:
    return method.grid(0).tolist()


def sizes(method: Any) -> list[int]:
    """Levels of the grid of each update."""
    return [len(method.grid(step)) for step in range(6)]


def segments(method: Any) -> list[int]:
    return [method.segments(step) for step in range(6)]


def way(method: Any) -> str:
    return method.derivative.way


@dataclass(frozen=True)
class Case:
    """An option's other value, the number it moves, and what must be set for it to act; ``wanted`` where the number
    itself is known."""

    value: Any
    number: Number
    given: dict[str, Any] = field(default_factory=dict)
    wanted: Any = None


DECAY = {"target_decay": Case(0.4, target, {"target_decay": 0.8}, wanted=0.4)}
LEARNT = {
    "noise_share": Case(0.5, loss),
    "source": Case("images", needs, wanted={"noise", "prompts", "images"}),
}
ON_GRID = {"grid": Case(100, loss), "skip": Case(4, loss), "huber": Case(0.1, loss), "shift": Case(3.0, loss)}
ECT = {"curriculum": "ect", "sigma_max": 20.0}
ICT = {"law": "lognormal"}
CRITICS = {"adversarial_weight": 0.1, "score_weight": 1.0, "segments": (1,)}
LATE = {**CRITICS, "segments": (8, 2, 1), "stage_updates": 2}
LAST = pytest.approx((1.0, 0.9, 0.75, 0.5))  # s u / (1 + (s - 1) u) for s = 3
CASES: dict[Any, dict[str, Case]] = {
    LCM: {
        **DECAY, **LEARNT, **ON_GRID,
        "guidance": Case(3.0, loss),
        "step_guidance": Case(3.0, loss),
        "guidance_range": Case((3.0, 15.0), loss),
        "embed_guidance": Case(False, drawing, {"guidance_range": (3.0, 15.0)}, wanted=(True, 50, None, None, {})),
    },
    Consistency: {
        **DECAY, **LEARNT,
        "guidance": Case(3.0, loss),
        "shift": Case(3.0, drawn_times, wanted=LAST),
        "solver": Case("ddim", loss),
        "curriculum": Case("ect", loss),
        "sigma_min": Case(0.1, levels),
        "sigma_max": Case(10.0, levels),
        "rho": Case(3.0, levels),
        "grid": Case(4, sizes, wanted=[5] * 6),
        "grid_max": Case(40, sizes, {"double_every": 2}, wanted=[18, 18, 35, 35, 41, 41]),
        "double_every": Case(2, sizes, wanted=[18, 18, 35, 35, 69, 69]),
        "law": Case("lognormal", loss),
        "log_mean": Case(1.0, loss, ICT),
        "log_deviation": Case(0.5, loss, ECT),
        "q": Case(4.0, loss, ECT),
        "weight": Case(True, loss),
        "huber": Case(None, loss),
    },
    RCM: {
        **LEARNT,
        "guidance": Case(3.0, loss),
        "shift": Case(3.0, drawn_times, wanted=LAST),
        "log_mean": Case(0.5, loss),
        "log_deviation": Case(0.5, loss),
        "tangent_warmup": Case(20, loss),
        "offset": Case(0.5, loss),
        "adaptive": Case(True, lambda method: len(list(modules_of(method)["student"].parameters())), wanted=9),
        "derivative": Case("difference", way, wanted="difference"),
        "derivative_step": Case(0.2, loss, {"derivative": "difference"}),
        "score_weight": Case(0.3, loss),
        "renoise": Case(False, drawing, wanted=(False, 50, None, None, {})),
        "score_guidance": Case(0.5, loss),
        "score_guidance_interval": Case((0.0, 0.4), loss),
        "score_times": Case((0.4, 0.6), loss),
        "fake_loss": Case("x0", loss_of_fake),
        "fake_updates": Case(2, turns, wanted="ffs" * 13 + "f"),
        "fake_lr_ratio": Case(7.0, rates, wanted=[1.0, 7.0]),
        "fake_warm_start": Case(2, turns, wanted="ff" + "ffffs" * 7 + "fff"),
    },
    SCM: {
        **LEARNT,
        "guidance": Case(3.0, loss),
        "shift": Case(3.0, drawn_times, wanted=LAST),
        "log_mean": Case(0.5, loss),
        "log_deviation": Case(0.5, loss),
        "tangent_warmup": Case(20, loss),
        "offset": Case(0.5, loss),
        "adaptive": Case(False, lambda method: len(list(modules_of(method)["student"].parameters())), wanted=8),
        "derivative": Case("difference", way, wanted="difference"),
        "derivative_step": Case(0.2, loss, {"derivative": "difference"}),
    },
    TBCM: {
        **DECAY,
        "guidance": Case(3.0, loss),
        "shift": Case(3.0, drawn_times, wanted=LAST),
        "route": Case(8, lambda method: method.route(full_batch()).shape[1], wanted=9),
        "route_shift": Case(1.0, loss),
        "points": Case(3, loss),
        "huber": Case(0.1, loss),
    },
    TCD: {
        **DECAY, **LEARNT, **ON_GRID,
        "guidance": Case(3.0, loss),
        "guidance_range": Case((3.0, 15.0), loss),
        "gamma": Case(0.3, drawing, {"path": TABLE}, wanted=(True, 50, None, 0.3, {"eta": 0.3})),
    },
    PCM: {
        **DECAY,
        "source": LEARNT["source"],
        "guidance": Case(3.0, loss),
        "shift": Case(3.0, loss),
        "grid": Case(8, loss),
        "start_share": Case(0.5, loss),
        "huber": Case(0.1, loss),
        "adversarial_weight": Case(0.3, loss, {"adversarial_weight": 0.1}),
    },
    TSCD: {
        **DECAY, **LEARNT, **ON_GRID,
        "guidance": Case(3.0, loss),
        "grid": Case(80, loss),
        "segments": Case((4, 1), segments, {"stage_updates": 3}, wanted=[4, 4, 4, 1, 1, 1]),
        "stage_updates": Case(2, segments, {"stage_updates": 1}, wanted=[8, 8, 4, 4, 2, 2]),
        "adversarial_weight": Case(0.3, loss, CRITICS),
        "score_weight": Case(2.0, loss, CRITICS),
        "critic_segments": Case(1, turns, LATE, wanted="ssss" + "fs" * 18),
        "gamma": Case(0.3, drawing, {"path": TABLE}, wanted=(True, 40, None, 0.3, {"eta": 0.3})),
        "renoise": Case(False, drawing, {"path": TABLE}, wanted=(True, 40, None, 0.0, {})),
        "score_guidance": Case(0.5, loss, CRITICS),
        "score_guidance_interval": Case((0.0, 0.4), loss, CRITICS),
        "score_times": Case((0.4, 0.6), loss, CRITICS),
        "fake_loss": Case("output", loss_of_fake, CRITICS),
        "fake_updates": Case(3, turns, CRITICS, wanted="fffs" * 10),
        "fake_lr_ratio": Case(7.0, rates, CRITICS, wanted=[1.0, 7.0]),
        "fake_warm_start": Case(2, turns, CRITICS, wanted="ff" + "fs" * 19),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind in FAMILY for option in CASES[kind]])
def test_an_option_moves_its_number(kind: Any, option: str) -> None:
    case = CASES[kind][option]
    usual = made(kind, **case.given)
    assert getattr(usual.options, option) != case.value
    before, after = case.number(usual), case.number(made(kind, **{**case.given, option: case.value}))
    if isinstance(before, float):
        assert math.isfinite(after) and abs(after - before) > 1e-4 * abs(before), (before, after)
    assert before != after
    if case.wanted is not None:
        assert after == (pytest.approx(case.wanted) if isinstance(case.wanted, float) else case.wanted)


@pytest.mark.parametrize("name", method_names())
def test_no_option_of_any_method_is_left_out(name: str) -> None:
    """A table has every option of the method; in that of the flow maps, with the class that says it."""
    kind = find_method(name)
    if kind in CASES:
        seen = set(CASES[kind]) | ELSEWHERE
    elif kind in test_options_matching.OWN:
        seen = set(test_options_matching.cases_of(kind)) | test_options_matching.ELSEWHERE
    else:
        covered = set(test_options_flow.CHECKS) | test_options_flow.CACHED
        seen = {
            option
            for option in kind.Options.model_fields
            for said in kind.Options.__mro__
            if f"{test_options_flow.name_of(said)}.{option}" in covered
        } | set(MethodOptions.model_fields)
        seen |= set(test_options_further.FURTHER.get(name, ()))
        seen |= set(test_options_onpolicy.EVERY.get(kind, ()))
        seen |= test_options_further.OWN_TEST.get(name, set()) | {"fake_lora_rank"}
    assert set(kind.Options.model_fields) <= seen


# --- what the family shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
def test_how_the_students_of_the_family_are_drawn(kind: Any) -> None:
    """A consistency function with fresh noise out of 50 times, in any number of steps; jumps without noise on a flow
    path, with gamma on a table; phases from edge to edge."""
    flow, table = (made(kind, path).sampler() for path in (FlowPath(), TABLE))
    for sampler, path in ((flow, FlowPath()), (table, TABLE)):
        jumps, phases = kind in (TCD, TSCD), kind is PCM
        assert sampler.times == (1.0, 0.5) and not sampler.two_times and sampler.guidance is None
        assert sampler.renoise == (not phases and (not jumps or path is TABLE))
        assert sampler.grid == (None if phases else 40 if kind is TSCD else 50)
        assert sampler.gamma == (float(kind is TSCD) if jumps and path is TABLE else None)


@pytest.mark.parametrize("kind", [kind for kind in FAMILY if "target_decay" in kind.Options.model_fields])
def test_a_target_is_a_number_to_the_gradient(kind: Any) -> None:
    """The student as its own target teaches what a frozen copy of it does, and the copy has no gradient."""
    found = []
    for decay in (0.0, 0.5):
        method = made(kind, target_decay=decay)
        method.target = type(method.target)(Copies(method.teacher, method.student), decay)
        loss_of(method, "student", full_batch(step=7))[0].backward()
        found.append([p.grad for p in method.student.net.parameters()])
    assert all(p.grad is None for p in method.target.denoiser.net.parameters())
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("path", [TABLE, FlowPath(3.0)], ids=["table", "flow"])
@pytest.mark.parametrize("kind", [LCM, TCD, TSCD])
def test_a_teacher_step_is_k_timesteps_long_and_starts_on_the_grid(kind: Any, path: Path) -> None:
    """With 50 times and a skip of 3, from each of timesteps 19, 39, ... 999 to 60 below, the lowest to timestep 0; on a
    flow path in shifted times, the lowest to clean data, also those that would end far beyond it. The share at pure
    noise is what was asked for."""
    more = {"segments": (1,)} if kind is TSCD else {}
    for share, skip in ((0.0, 3), (0.3, 3), (0.0, 40)):
        method = made(kind, path, grid=50, skip=skip, noise_share=share, target_decay=0.5, **more)
        seen, then = (
            test_options_flow.Calls(net) for net in (method.student.net, method.target.denoiser.net)
        )
        read = test_options_flow.Calls(method.teacher.denoiser.net)
        batch = toy_batch(600, step=7, pairs=lambda z: z)
        with torch.no_grad():
            loss_of(method, "student", batch)
        t, s = (1000 * path.unshifted(times) for times in (seen.t[0], then.t[0]))
        assert torch.equal(seen.t[0], read.t[0]) and torch.equal(seen.x[0], read.x[0])
        assert {round(time) for time in t.tolist()} == set(range(20, 1001, 20))
        torch.testing.assert_close(s, (t - 20 * skip).clamp_min(float(path is TABLE)), atol=0.02, rtol=0)
        assert float((t > 999).float().mean()) == pytest.approx(share + (1 - share) / 50, abs=0.05)
