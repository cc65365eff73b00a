"""Every option of the methods that no other table has: changed, a short training goes another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepdistill.diffusion.path import FlowPath
from stepdistill.methods import find_method
from stepdistill.networks.roles import Copies
from stepdistill.testing.contract import batch_for, equipped
from stepdistill.testing.toys import Perceptron, ToyTeacher, toy_student

UPDATES = 24
PARTS = {"regression_updates": (2,), "trajectory_updates": 2, "relaxed_updates": 2}
FURTHER: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "echo": {
        "identity_weight": (2.0, {}),
        "squared_weight": (1.0, {}),
        "wasserstein_weight": (1.0, {}),
        "adversarial_weight": (1.0, {}),
        "keep_weight": (0.2, {}),
        "prior_weight": (0.2, {}),
        "echo_share": (1.0, {"echo_after": 4, "echo_floor": -1.0}),
        "echo_after": (8, {"echo_after": 4, "echo_floor": -1.0}),
        "echo_floor": (1.0, {"echo_after": 4, "echo_floor": -1.0}),
        "learner_lr_ratio": (2.0, {}),
        "word_lr_ratio": (2.0, {}),
        "discriminator_lr_ratio": (2.0, {}),
        "renoise": (True, {}),
    },
    "gdd": {
        "warm_start_betas": ((0.9, 0.99), {"warm_start": 4}),
        "discriminator_updates": (3, {}),
        "discriminator_lr_ratio": (2.0, {}),
        "penalty_weight": (1.0, {"penalty_every": 2}),
        "penalty_every": (2, {"penalty_weight": 1.0}),
        "renoise": (True, {}),
        "noise_times": ((0.2, 0.9), {}),
    },
    "internalise": {
        "move": ("unit", {"beta": 5.0}),
        "beta": (9.0, {"beta": 5.0}),
        "length": (0.4, {"move": "unit"}),
        "eta": (0.9, {"beta": 5.0}),
    },
    "ladd": {
        "warm_start_betas": ((0.9, 0.99), {"warm_start": 4}),
        "discriminator_updates": (1, {}),
        "discriminator_lr_ratio": (2.0, {}),
        "penalty_weight": (1.0, {"penalty_every": 2}),
        "penalty_every": (2, {"penalty_weight": 1.0}),
        "renoise": (True, {}),
        "source": ("images", {}),
        "first_share": (0.2, {}),
        "noise_mean": (-1.0, {}),
        "noise_deviation": (2.0, {}),
        "hinge": (True, {}),
        "distillation_weight": (0.5, {}),
    },
    "lightning": {
        "source": ("images", {}),
        "ratios": ((2, 3), {"ratios": (2, 2), **PARTS}),
        "teacher_decay": (0.9, {"ratios": (2, 2), **PARTS}),
        "regression_updates": ((2, 4), {"ratios": (2, 2), **PARTS}),
        "trajectory_updates": (4, PARTS),
        "relaxed_updates": (3, {"ratios": (2, 2), **PARTS}),
        "adversarial_from": (1, {"ratios": (2, 2), **PARTS}),
        "regression_lr_ratio": (2.0, PARTS),
        "discriminator_lr_ratio": (2.0, {}),
        "noise_times": ((0.2, 0.3, 0.5, 0.9), {}),
        "noise_shares": ((1.0, 1.0, 1.0, 5.0), PARTS),
    },
    "opd": {
        "teacher_calls": (2, {}),
        "eta": (0.5, {"teacher_calls": 1}),
        "estimator": ("policy", {"teacher_calls": 1, "eta": 0.5}),
        "advantage_clip": (0.01, {"teacher_calls": 1, "eta": 0.5, "estimator": "policy"}),
        "measured": ("x0", {}),
        "renoise": (True, {}),
    },
    "progressive": {
        "source": ("images", {}),
        "ratios": ((4, 2), {"stage_updates": 6}),
        "stage_updates": (3, {"stage_updates": 6}),
        "weighting": ("snr_plus_one", {}),
        "teacher_decay": (0.9, {"stage_updates": 6}),
        "anneal": (False, {"stage_updates": 6}),
    },
    "self_opd": {
        "source": ("images", {}),
        "reference_calls": (2, {"source": "images"}),
        "keep_weight": (0.2, {"source": "images"}),
        "renoise": (True, {}),
    },
    "uni_dad": {
        "score_guidance": (3.0, {}),
        "score_guidance_interval": ((0.0, 0.4), {"guidance": 3.0}),
        "score_times": ((0.4, 0.6), {}),
        "renoise": (True, {}),
        "pair_weight": (0.5, {}),
        "adversarial_weight": (0.5, {}),
        "discriminator_weight": (0.5, {}),
        "target_share": (0.75, {}),
        "target_lr_ratio": (3.0, {}),
        "normaliser": ("own", {}),
    },
}

OWN_TEST = {
    "echo": {"features"},  # networks that a run loads: tests/training/test_new_word.py
    "opd": {"guidance_of", "anchor_weight"},  # of several teachers
    "self_opd": {"early_decay", "early_updates", "target_decay"},  # of a teacher that rich captions tell more
}
"""Options that tests/methods/test_echo.py, test_opd.py and test_self_opd.py move."""


def made(name: str, options: dict[str, Any]) -> Any:
    kind, path = find_method(name), FlowPath()
    teacher = ToyTeacher(Perceptron(seed=0), path, "velocity", unguided=Perceptron(seed=2))
    student = toy_student(Perceptron(seed=1), path, "velocity")
    times = (1.0, 0.5) if len(kind.default_times) == 1 else kind.default_times
    return equipped(kind, Copies(teacher, student), times, kind.Options(**options))


def short_training(method: Any) -> tuple[list[tuple[Any, ...]], object]:
    """Whose turn each update was, its rate, its betas, its loss; and how the student is drawn at the end."""
    rows: list[tuple[Any, ...]] = []
    trained = {name: one.parameters(method.roles) for name, one in method.trained().items()}
    for step in range(UPDATES):
        turn = method.turn(step)
        own = trained[turn.network]
        for name, parameters in trained.items():
            for parameter in parameters:
                parameter.requires_grad_(name == turn.network)
        loss = method.loss(turn, batch_for(method, 8, step)).value
        rate = 0.002 * method.lr_ratio(turn)
        for parameter, slope in zip(own, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
            if slope is not None:
                parameter.data -= rate * slope
        method.after_step(turn)
        rows.append((turn.network, method.lr_ratio(turn), method.betas(turn), round(float(loss.detach()), 9)))
    sampler = method.sampler()
    return rows, (sampler.times, sampler.renoise)


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in FURTHER for option in FURTHER[name]])
def test_an_option_moves_a_short_training(name: str, option: str) -> None:
    value, given = FURTHER[name][option]
    usual, other = made(name, given), made(name, {**given, option: value})
    assert getattr(usual.options, option) != getattr(other.options, option)
    assert short_training(made(name, given)) == short_training(usual) != short_training(other)
