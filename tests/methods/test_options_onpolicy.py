"""Every option of the on-policy methods: changed, it moves the number it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from matching_toy import full_batch

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.contract import Method, MethodOptions, PairOptions, Turn
from stepdistill.losses.regression import WarmStartOptions
from stepdistill.losses.rewards import Rewards
from stepdistill.methods.crd import CRD
from stepdistill.methods.internalise import Internalise
from stepdistill.methods.opd import OPD
from stepdistill.methods.self_opd import SelfOPD
from stepdistill.networks.roles import TEACHER, Copies
from stepdistill.networks.route import Route
from stepdistill.testing.contract import nearness
from stepdistill.testing.toys import Perceptron, ToyTeacher, loss_of, toy_student

ELSEWHERE = set(PairOptions.model_fields) | set(WarmStartOptions.model_fields)
"""Options of the teacher, of the cache of pairs and of the warm start, which other tests have."""

Number = Callable[[Any], Any]


def made(kind: type[Method], **options: Any) -> Any:
    """A method between perceptrons, with a second teacher for every other prompt where it takes several."""
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity", unguided=Perceptron(seed=2))
    roles = Copies(teacher, toy_student(Perceptron(seed=1), path, "velocity"))
    if kind.several_teachers:
        other = ToyTeacher(Perceptron(seed=3), path, "velocity", unguided=Perceptron(seed=4))
        roles.route = Route({TEACHER: teacher, "other": other}, torch.arange(16) % 2)
    method = kind(roles, (1.0, 0.5), kind.Options.model_validate({"guidance": 2.0, **options}))
    method.rewards = Rewards(lambda x0: x0, (nearness,))
    return method


def loss(method: Any) -> float:
    steps = (5, 6, 7, 8)  # some end at a second call
    return sum(
        float(loss_of(method, Turn("student", step), full_batch(step=step))[0].detach()) for step in steps
    )


def gradient(method: Any) -> float:
    value, _ = loss_of(method, Turn("student", 5), full_batch())
    found = torch.autograd.grad(value, list(method.student.net.parameters()))
    return sum(float(each.square().sum()) for each in found)


@dataclass(frozen=True)
class Case:
    """An option's other value, the number it moves, and what must be set for it to act."""

    value: Any
    number: Number = loss
    given: dict[str, Any] = field(default_factory=dict)


def average(method: Any) -> float:
    """Where the student's average is after one update."""
    with torch.no_grad():
        for value in method.student.net.parameters():
            value += 1
    method.after_step(Turn("student", 0))
    return float(next(iter(method.average.net.parameters())).detach().sum())


IMAGES = {"source": "images"}
POLICY = {"eta": 0.6, "estimator": "policy"}


def left(method: Any) -> float:
    """The loss of a group where the student has left its averages."""
    with torch.no_grad():
        for value in method.student.net.parameters():
            value += 0.05
    batch = replace(full_batch(), group=4)
    return float(loss_of(method, Turn("student", 5), batch)[0].detach())


def late(method: Any) -> Any:
    return method.decays(100)


EVERY: dict[type[Method], dict[str, Case]] = {
    CRD: {
        "guidance": Case(3.0, left),
        "beta": Case(0.5, left),
        "advantage_clip": Case(1.0, left),
        "noisings": Case(2, left),
        "reference_weight": Case(0.5, left),
        "reference_updates": Case(6, left),
        "old_decay": Case(0.5, late),
        "old_rise": Case(0.1, late),
        "draws_itself": Case(10, late),
        "draws_rise": Case(0.1, late),
    },
    Internalise: {
        "guidance": Case(3.0),
        "move": Case("unit"),
        "beta": Case(0.2),
        "length": Case(0.2, given={"move": "unit"}),
        "eta": Case(0.9),
    },
    OPD: {
        "guidance": Case(3.0),
        "guidance_of": Case({"other": 1.0}),
        "teacher_calls": Case(2),
        "eta": Case(0.5),
        "estimator": Case("policy", gradient, {"eta": 0.6}),
        "advantage_clip": Case(1e-3, gradient, POLICY),
        "measured": Case("x0"),
        "anchor_weight": Case(0.5),
        "renoise": Case(True, lambda method: method.sampler().renoise),
    },
    SelfOPD: {
        "source": Case("images", lambda method: method.options.needs),
        "reference_calls": Case(2, given=IMAGES),
        "keep_weight": Case(0.5, given=IMAGES),
        "early_decay": Case(0.5, average),
        "early_updates": Case(0, average),
        "target_decay": Case(0.5, average, {"early_updates": 0}),
        "renoise": Case(True, given=IMAGES),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in EVERY.items() for name in cases])
def test_an_option_moves_what_it_is_to_move(kind: type[Method], name: str) -> None:
    case = EVERY[kind][name]
    plain, changed = made(kind, **case.given), made(kind, **case.given, **{name: case.value})
    assert case.number(plain) != case.number(changed)


def test_no_option_is_left_out() -> None:
    for kind, cases in EVERY.items():
        own = set(kind.Options.model_fields) - (ELSEWHERE - set(MethodOptions.model_fields))
        assert own - cases.keys() <= {
            "guidance",
            "guidance_2",
            "guidance_interval",
            "guidance_rescale",
            "shift",
        }
        assert cases.keys() <= set(kind.Options.model_fields)
