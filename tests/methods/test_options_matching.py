"""Every option of the methods that match distributions, and every term: changed, it moves the number it should."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from matching_toy import full_batch

from stepdistill.diffusion.path import FlowPath, Prediction
from stepdistill.losses.contract import MethodOptions, PairOptions, Turn
from stepdistill.losses.distances import DistanceName
from stepdistill.losses.fake_score import ScoreMethod, Views
from stepdistill.losses.objective import Objective
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import GanTerm, PerceptualTerm, RegressionTerm
from stepdistill.methods.asd import ASD
from stepdistill.methods.diff_instruct import DiffInstruct
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd import DMD
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.gndm import GNDM
from stepdistill.methods.gndmr import GNDMR
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.methods.sid import SiD
from stepdistill.methods.sim import SIM
from stepdistill.methods.vdot import VDOT
from stepdistill.networks.roles import Copies
from stepdistill.recipes.term_options import TermOptions
from stepdistill.testing.toys import SHAPE, Mixture, Perceptron, ToyTeacher, loss_of, modules_of, toy_student

ELSEWHERE = set(PairOptions.model_fields) - set(MethodOptions.model_fields)
ELSEWHERE |= {"guidance_2", "guidance_rescale", "fake_lora_rank"}
"""Options that no method reads: the cache of pairs does (tests/data/test_data.py), and the teacher
(tests/losses/test_terms.py, tests/families/test_wan_2_2.py); of adapters alone (tests/networks/test_roles.py)."""

Number = Callable[[Any], Any]


def made(kind: Any, times: tuple[float, ...] = (1.0, 0.5), **options: Any) -> Any:
    """A method between perceptrons on a flow path, off its start, with guided and unguided teachers."""
    path = FlowPath(options.get("shift", 1.0))  # as PipelineTeacher does
    teacher = ToyTeacher(Perceptron(), path, "velocity", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), path, "velocity")
    method = kind(Copies(teacher, student), times, kind.Options(**{"guidance": 2.0, **options}))
    with torch.no_grad():
        for parameter in method.fake.net.parameters():
            parameter *= 1.1
    method.rewards = Rewards(lambda x0: x0, (lambda x0, prompt: -(x0 - 2).flatten(1).square().sum(1),))
    return method


# --- the numbers -------------------------------------------------------------------------------------------------


def student_step(method: Any) -> int:
    """The first step that is a matching update of the student."""
    return next(
        s
        for s in range(200)
        if method.turn(s).network != "fake" and s >= getattr(method.options, "warm_start", 0)
    )


def loss_of_student(method: Any) -> float:
    step = student_step(method)
    return float(loss_of(method, method.turn(step).network, full_batch(step=step))[0].detach())


def loss_of_fake(method: Any) -> float:
    return float(loss_of(method, "fake", full_batch(step=0))[0].detach())


def loss_of_warm_start(method: Any) -> float:
    return float(loss_of(method, method.turn(0).network, full_batch(step=0))[0].detach())


def gradient_of_student(method: Any) -> float:
    step = student_step(method)
    turn = method.turn(step).network
    parameters = list(modules_of(method)[turn].parameters())
    found = torch.autograd.grad(
        loss_of(method, turn, full_batch(step=step))[0], parameters, allow_unused=True
    )
    return sum(float(g.square().sum()) for g in found if g is not None) ** 0.5


def turns(method: Any) -> str:
    return "".join(method.turn(step).network[0] for step in range(40))


def rates(method: Any) -> list[float]:
    return [method.lr_ratio(method.turn(step)) for step in range(8)]


def needs(method: Any) -> frozenset[str]:
    return method.options.needs


def renoise(method: Any) -> bool:
    return method.sampler().renoise


def networks(method: Any) -> list[str]:
    return list(modules_of(method))


def means(method: Any) -> float:
    """f-distill's running mean after one step of planted logits."""
    method.weight(torch.linspace(-3, 3, 32), torch.linspace(0.02, 0.98, 32))
    method.weight.update()
    return float(method.weight.mean_ratio.sum() + method.weight.mean_weight)


def weights(method: Any) -> list[float]:
    return method.weight(torch.linspace(-3, 3, 8), torch.full((8,), 0.5)).tolist()


def after_a_step(method: Any) -> float:
    """The student's loss once a step has told what rewards are usual."""
    loss_of_student(method)
    method.after_step(Turn("student", 0))
    return loss_of_student(method)


def targets(method: Any) -> list[int]:
    return [method.target_of(step) for step in range(100, 1000, 6)]


def transport(method: Any) -> float:
    """VDOT's field between two pictures of sixteen tokens."""
    a, b = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    t = torch.full((3,), 0.5)
    views = Views(a, a, t, Prediction(FlowPath(), b, b, t), Prediction(FlowPath(), a, a, t))
    return float(method.transport(views).square().mean())


def gradient_of_pairs(method: Any) -> float:
    """Of ASD's student in a round of one step, where a discriminator pulls."""
    step = next(
        s
        for s in range(5, 200)
        if method.turn(s).network == "student" and not method.place(full_batch(step=s))
    )
    loss = loss_of(method, "student", full_batch(step=step))[0]
    return (
        sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(method.student.net.parameters())))
        ** 0.5
    )


def in_groups(method: Any) -> float:
    """The student's loss where samples have others of their prompt beside them."""
    batch = replace(full_batch(step=student_step(method)), group=4)
    return float(loss_of(method, "student", batch)[0].detach())


def in_four_steps(method: Any) -> float:
    method.times = (1.0, 0.75, 0.5, 0.25)
    return loss_of_student(method)


@dataclass(frozen=True)
class Case:
    """An option's other value, the number it moves, and what must be set for it to act."""

    value: Any
    number: Number
    given: dict[str, Any] = field(default_factory=dict)


WARM = {"warm_start": 3}
FIRST = {"first_step_weight": 1.0}
AT_TEACHER = {"waypoints": 1}
EVERY: dict[str, Case] = {
    "guidance": Case(3.0, loss_of_student),
    "guidance_interval": Case((0.0, 0.4), loss_of_student),
    "score_guidance": Case(0.5, loss_of_student),
    "score_guidance_interval": Case((0.0, 0.4), loss_of_student),
    "shift": Case(3.0, loss_of_student),
    "score_times": Case((0.4, 0.6), loss_of_student),
    "fake_loss": Case("other", loss_of_fake),
    "fake_updates": Case(3, turns),
    "fake_lr_ratio": Case(7.0, rates),
    "fake_warm_start": Case(5, turns),
    "renoise": Case(True, renoise),
    "warm_start": Case(3, needs),
    "warm_start_lr_ratio": Case(9.0, rates, WARM),
    "pair_distance": Case("l1", loss_of_warm_start, WARM),
}
SCORE: dict[str, Case] = {
    "pair_weight": Case(0.3, loss_of_student),
    "adversarial_weight": Case(0.3, loss_of_student),
    "discriminator_weight": Case(0.3, loss_of_fake, {"adversarial_weight": 0.1}),
}
OWN: dict[Any, dict[str, Case]] = {
    DMD: {
        "decoupled": Case(True, loss_of_student),
        "first_step_weight": Case(0.3, loss_of_student, {"first_step_weight": 0.1}),
        "first_step_calls": Case(2, loss_of_student, FIRST),
        "first_step_grid": Case(10, loss_of_student, FIRST),
        "reweight": Case("reward", after_a_step),
        "reweight_scale": Case(0.5, after_a_step, {"reweight": "reward"}),
    },
    GNDM: {"climb_weight": Case(0.3, loss_of_student)},
    GNDMR: {
        "eta": Case(0.5, loss_of_student),
        "policy_steps": Case(3, in_four_steps),
        "noisings": Case(2, in_groups),
        "matching_weight": Case(0.3, in_groups),
        "climb_weight": Case(0.3, in_groups),
        "field_weight": Case(0.3, loss_of_student),
    },
    DisBack: {
        "waypoints": Case(3, targets),
        "interval": Case(7, targets),
        "fake_updates": Case(3, turns, {"fake_warm_start": 4}),
        "guidance": Case(3.0, loss_of_student, AT_TEACHER),
        "guidance_interval": Case((0.0, 0.4), loss_of_student, AT_TEACHER),
        "score_guidance": Case(0.5, loss_of_student, AT_TEACHER),
        "score_guidance_interval": Case((0.0, 0.4), loss_of_student, AT_TEACHER),
    },
    VDOT: {
        "transport_weight": Case(0.3, loss_of_student),
        "matching_weight": Case(0.3, loss_of_student),
        "entropy": Case(0.5, transport),
        "iterations": Case(2, transport),
        "layout": Case(1.0, transport),
        "debiased": Case(False, transport),
        "through_networks": Case(True, gradient_of_student),
    },
    ASD: {
        "self_weight": Case(0.9, gradient_of_pairs),
        "slope_weight": Case(0.9, loss_of_fake),
    },
    DiffInstruct: {"weight": Case("kl", loss_of_student)},
    FDistill: {
        "divergence": Case("forward_kl", weights),
        "ratio_range": Case((0.5, 2.0), weights),
        "ratio_ema": Case(0.5, means),
    },
    SiD: {"alpha": Case(1.0, loss_of_student)},
    SIM: {
        "distance": Case("l2", loss_of_student),
        "c": Case(0.5, loss_of_student),
        "weight": Case("score", loss_of_student),
        "stop_denominator": Case(True, gradient_of_student),
    },
    PhasedDMD: {
        "phases": Case(1, networks),
        "phase_updates": Case(2, turns, {"phase_updates": 3}),
        "clamp": Case(0.5, loss_of_fake),
    },
}


def cases_of(kind: Any) -> dict[str, Case]:
    return {**EVERY, **(SCORE if issubclass(kind, ScoreMethod) else {}), **OWN[kind]}


@pytest.mark.parametrize("kind", OWN)
def test_no_option_is_left_out(kind: Any) -> None:
    assert set(cases_of(kind)) == set(kind.Options.model_fields) - ELSEWHERE


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind in OWN for option in cases_of(kind)])
def test_an_option_moves_its_number(kind: Any, option: str) -> None:
    case = cases_of(kind)[option]
    value = case.value
    if value == "other":
        value = {"x0": "output", "output": "x0"}[kind.Options().fake_loss]
    usual = made(kind, **case.given)
    assert getattr(usual.options, option) != value
    before, after = case.number(usual), case.number(made(kind, **{**case.given, option: value}))
    if isinstance(before, float):
        assert math.isfinite(after) and abs(after - before) > 1e-5 * abs(before), (before, after)
    else:
        assert before != after


# --- terms -------------------------------------------------------------------------------------------------------


def with_terms(
    regression_weight: float = 0.0,
    regression: DistanceName = "l2",
    perceptual_weight: float = 0.0,
    gan_weight: float = 0.0,
    gan_lr_ratio: float = 1.0,
) -> Objective:
    kind = DMD
    teacher = ToyTeacher(Perceptron(), FlowPath(), "velocity")
    student = toy_student(Perceptron(seed=1), FlowPath(), "velocity")
    method = kind(Copies(teacher, student), (1.0, 0.5), kind.Options(guidance=1.0, fake_updates=1))
    terms = [
        RegressionTerm(regression_weight, regression),
        PerceptualTerm(perceptual_weight, lambda x: torch.nn.functional.normalize(x.flatten(1) + 2, dim=1)),
        GanTerm(gan_weight, teacher.denoiser, gan_lr_ratio),
    ]
    return Objective(method, [term for term in terms if term.weight])


def students_turn(objective: Objective, batch: Any) -> tuple[Any, dict[str, Any]]:
    return objective.loss(Turn("student", batch.draws.step), batch)


def term_batch(step: int) -> Any:
    images = Mixture(FlowPath()).sample(16, torch.Generator().manual_seed(7))
    batch = full_batch(step=step)
    return replace(batch, images=replace(batch.images, x0=images))


def own_turn(method: Objective) -> int:
    return next(step for step in range(20) if method.turn(step).network == "student")


@pytest.mark.parametrize(
    ("option", "term", "given"),
    [
        ("regression_weight", "term regression", {}),
        ("regression_weight", "term regression", {"regression": "l1"}),
        ("regression_weight", "term regression", {"regression": "huber"}),
        ("perceptual_weight", "term perceptual", {}),
        ("gan_weight", "term gan", {"gan_weight": 0.1}),
    ],
)
def test_a_terms_weight_is_what_it_is_multiplied_by(option: str, term: str, given: dict[str, Any]) -> None:
    """loss(w = a) - loss(w = b) = (a - b) term on one batch."""
    low, high = float(given.get(option, 0.0)), 0.7
    methods = [with_terms(**{**given, option: weight}) for weight in (low, high)]
    step = own_turn(methods[1]) if option == "gan_weight" else 1
    (one, _), (other, logs) = (students_turn(one, term_batch(step)) for one in methods)
    assert float((other - one).detach()) == pytest.approx((high - low) * float(logs[term].detach()), rel=1e-4)
    assert abs(float(logs[term].detach())) > 1e-4


def test_a_terms_distance_and_rate_are_those_given() -> None:
    seen = [
        students_turn(with_terms(regression_weight=1.0, regression=name), term_batch(1))[1]["term regression"]
        for name in ("l2", "l1", "huber")
    ]
    assert len({float(value.detach()) for value in seen}) == 3
    rates = [with_terms(gan_weight=1.0, gan_lr_ratio=r).lr_ratio(Turn("term gan", 0)) for r in (1.0, 4.0)]
    assert rates == [1.0, 4.0]
    assert (
        TermOptions(perceptual="clip:x").perceptual == "clip:x"
    )  # which network: tests/losses/test_terms.py


def test_the_generators_term_raises_the_logits_of_the_students_samples() -> None:
    """A step of the student against the gradient of the GAN term alone raises the discriminator's mean logit."""
    objective = with_terms(gan_weight=1.0)
    method, batch = objective.method, term_batch(own_turn(objective))
    parameters = list(method.student.net.parameters())
    t, eps = batch.draws.uniform("gan t"), batch.draws.normal("gan eps", SHAPE)

    def logit() -> float:
        x_t = FlowPath().noised(method.sample(batch), eps, t)
        return float(objective.terms["gan"].gan.logits(x_t, t, batch.cond).mean().detach())

    before = logit()
    _, logs = students_turn(objective, batch)
    gradients = torch.autograd.grad(logs["term gan"], parameters)
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    with torch.no_grad():
        for value, gradient in zip(parameters, gradients, strict=True):
            value -= 0.05 * gradient / norm
    assert logit() > before + 1e-4
