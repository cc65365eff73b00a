"""On-policy distillation between linear networks, whose paths are Gaussian and whose divergence is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import trajectory
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.losses.rollout import log_density, visits
from stepdistill.methods.opd import OPD
from stepdistill.networks.roles import TEACHER, Copies
from stepdistill.networks.route import Route
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

PATH = FlowPath()
TIMES = (1.0, 0.6, 0.3)


def between(
    student: nn.Module,
    teacher: nn.Module,
    times: tuple[float, ...] = TIMES,
    output: Any = "x0",
    others: dict[str, nn.Module] | None = None,
    owner: Sequence[int] = (),
    **options: Any,
) -> OPD:
    """The method between two networks; ``others`` teach as well, and prompt i belongs to teacher ``owner[i]``."""
    roles = Copies(ToyTeacher(teacher, PATH, output), toy_student(student, PATH, output))
    if others:
        further = {
            name: ToyTeacher(net, PATH, output, unguided=Affine(0.0, 0.0)) for name, net in others.items()
        }
        roles.route = Route({TEACHER: roles.teacher, **further}, torch.tensor(owner))
    return OPD(roles, times, OPD.Options.model_validate({"guidance": 1.0, "teacher_calls": 1, **options}))


OPTIONS = [{}, {"eta": 0.6}, {"measured": "x0"}, {"measured": "velocity"}, {"renoise": True}]


@pytest.mark.parametrize("options", [*OPTIONS, {"eta": 0.6, "estimator": "policy"}])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(options: dict[str, Any]) -> None:
    method = between(Perceptron(), Perceptron(), output="velocity", **options)
    loss, logs = loss_of(method, "student", toy_batch(16))
    assert float(logs["apart"]) == 0 and float(loss.detach()) == pytest.approx(0, abs=1e-10)
    grads = torch.autograd.grad(loss, list(method.student.net.parameters()))
    assert max(float(grad.abs().max()) for grad in grads) == 0


def chain(shift: float, scale: float, eta: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean [3], covariance [3, 3] of (z, x_0.6, x_0.3) that x0 = shift + scale x draws, float64."""
    angle = torch.tensor(eta * torch.pi / 2, dtype=torch.float64)
    rows, offsets = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    rows[0, 0] = 1.0  # of z, and of the noises that follow
    for k, (t, s) in enumerate(pairwise(TIMES)):
        # x0 = a + b x ; eps = (x - (1 - t) x0) / t ; x_s = (1 - s) x0 + s (cos eps + sin n)
        a, b, kept = shift, scale, s * torch.cos(angle)
        slope = (1 - s) * b + kept * (1 - (1 - t) * b) / t
        offset = (1 - s) * a - kept * (1 - t) * a / t
        rows[k + 1], offsets[k + 1] = slope * rows[k], offset + slope * offsets[k]
        rows[k + 1, k + 1] += s * torch.sin(angle)
    return offsets, rows @ rows.T, []


def test_the_steps_of_a_rollout_are_the_divergence_of_the_paths() -> None:
    """KL(N(m, A) || N(n, B)) of the joint Gaussians, by the textbook's formula, against the loss less its last step."""
    (m, a, _), (n, b, _) = chain(0.3, 0.5, 0.6), chain(-0.1, 0.8, 0.6)
    gap, inverse = n - m, torch.linalg.inv(b)
    kl = 0.5 * (torch.trace(inverse @ a) + gap @ inverse @ gap - 3 + torch.logdet(b) - torch.logdet(a))
    method, batch = between(Affine(0.3, 0.5), Affine(-0.1, 0.8), eta=0.6), toy_batch(60_000)
    found = visits(method.student, method.sampler(), batch, batch.cond, 0.6)
    total = sum(
        method.divergence(
            method.student.predict(v.x, v.t, Condition()), method.target(v, batch, method.roles.route), v
        )
        .mean()
        .item()
        for v in found[:2]
    )
    assert total == pytest.approx(float(kl), rel=0.02)


@pytest.mark.parametrize("renoise", [False, True])
def test_a_student_that_says_its_targets_draws_the_teachers_law(renoise: bool) -> None:
    """N(0.7, 0.4^2) in 4 steps, from the exact denoiser, whose own mean would have no spread in steps with noise."""
    times, count = (1.0, 0.75, 0.5, 0.25), 20_000
    exact = Gaussian(PATH, 0.7, 0.4)
    method, batch = between(exact, exact, times, renoise=renoise, teacher_calls=24), toy_batch(count)
    sampler, x = method.sampler(), batch.noise
    for call, visit in enumerate(visits(method.student, sampler, batch, batch.cond)):
        visit = replace(visit, x=x)
        said = method.target(visit, batch, method.roles.route)
        x = sampler.step(said, visit.s, lambda call=call: batch.fresh(call)).state  # type: ignore[misc]
    assert float(x.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(x.std()) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("calls", [1, 3])
def test_in_the_next_state_an_error_is_that_of_the_velocity_times_the_step(calls: int) -> None:
    losses = {
        measured: float(
            loss_of(
                between(
                    Affine(0.3, 0.5), Affine(-0.1, 0.8), (1.0, 0.5), measured=measured, teacher_calls=calls
                ),
                "student",
                toy_batch(32),
            )[0].detach()
        )
        for measured in ("state", "velocity")
    }
    assert losses["state"] == pytest.approx(0.25 * losses["velocity"], rel=1e-4)


def test_one_step_in_the_clean_sample_is_the_next_state() -> None:
    one, two = (
        loss_of(between(Affine(0.3, 0.5), Affine(-0.1, 0.8), (1.0,), measured=kind), "student", toy_batch(8))[
            0
        ]
        for kind in ("state", "x0")
    )
    torch.testing.assert_close(one, two)
    wanted = ((0.4 - 0.3 * toy_batch(8).noise).square().mean() / 2).expand(())
    torch.testing.assert_close(one.detach(), wanted)


def gradients(estimator: str, published: bool = False, repeats: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the mean of the gradient in the student's two numbers, without the last step, which
    draws nothing."""
    method = between(Affine(0.3, 0.5), Affine(-0.1, 0.8), eta=0.6, estimator=estimator, advantage_clip=1e6)
    compare = method.surrogate if estimator == "policy" else method.divergence
    found = []
    for step in range(repeats):
        batch, total = toy_batch(256, step), torch.zeros(())
        for visit in visits(method.student, method.sampler(), batch, batch.cond, 0.6)[:2]:
            own = method.student.predict(visit.x, visit.t, Condition())
            target = method.target(visit, batch, method.roles.route)
            if published:
                advantage = -method.divergence(own, target, visit).detach()
                total = total - (advantage * log_density(visit, method.mean(own, visit))).mean()
            else:
                total = total + compare(own, target, visit).mean()
        found.append(torch.stack(torch.autograd.grad(total, list(method.student.net.parameters()))))
    every = torch.stack(found)
    return every.mean(0), every.std(0) / repeats**0.5


def test_the_policys_gradient_is_the_exact_one_with_more_variance() -> None:
    exact, spread = gradients("exact")
    policy, wider = gradients("policy")
    assert bool(((policy - exact).abs() < 4 * (spread + wider)).all())
    assert bool((wider > 1.5 * spread).all()) and bool((exact.abs() > 20 * spread).all())


def test_the_published_advantage_has_no_gradient_in_the_mean() -> None:
    mean, spread = gradients("policy", published=True)
    assert bool((mean.abs() < 4 * spread).all())


def test_a_prompt_never_meets_the_teacher_of_another() -> None:
    batch = replace(toy_batch(6), prompt=torch.tensor([2, 0, 1, 3, 2, 0]))
    others: dict[str, nn.Module] = {"night": Affine(1.0, 0.0), "day": Affine(0.0, 2.0)}
    method = between(Affine(0.0, 0.0), Affine(0.0, 0.0), (1.0,), others=others, owner=[0, 1, 2, 0])
    seen: dict[str, list[Tensor]] = {}
    for name, each in method.roles.route.teachers.items():
        each.denoiser.net.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(args[0])
        )
    loss, _ = loss_of(method, "student", batch)
    for name, own in {TEACHER: [1, 3, 5], "day": [0, 4], "night": [2]}.items():
        assert torch.equal(torch.cat(seen[name]), batch.noise[own])
    wanted = torch.zeros(6, *SHAPE)
    wanted[2], wanted[[0, 4]] = 1.0, 2 * batch.noise[[0, 4]]
    torch.testing.assert_close(loss.detach(), wanted.square().mean() / 2)


def test_each_teacher_has_a_guidance_of_its_own() -> None:
    """Unguided they draw 0, and guided the scale."""
    others: dict[str, nn.Module] = {"night": Affine(1.0, 0.0), "day": Affine(1.0, 0.0)}
    own: dict[str, Any] = {"guidance": 3.0, "guidance_of": {"night": 2.0}}
    method = between(Affine(0.0, 0.0), Affine(1.0, 0.0), (1.0,), others=others, owner=[0, 1, 2, 1], **own)
    batch = toy_batch(4)
    visit = visits(method.student, method.sampler(), batch, batch.cond)[0]
    said = method.target(visit, batch, method.roles.route).x0
    assert [float(row.mean()) for row in said] == pytest.approx([1.0, 2.0, 3.0, 2.0])


def test_further_teachers_lead_away_from_the_recipes_own() -> None:
    alone = between(Affine(0.0, 0.0), Affine(1.0, 0.0))
    several = between(Affine(0.0, 0.0), Affine(1.0, 0.0), others={"night": Affine(1.0, 0.0)}, owner=[0, 1])
    assert not alone.leaves_teacher and several.leaves_teacher


def test_an_anchor_draws_every_prompt_to_the_recipes_own_teacher() -> None:
    """A student at 0, half of its prompts with a teacher at 1, the others, and the anchor, at 2."""
    batch = toy_batch(4)
    plain, anchored = (
        between(
            Affine(0.0, 0.0),
            Affine(2.0, 0.0),
            (1.0,),
            others={"night": Affine(1.0, 0.0)},
            owner=[0, 1, 1, 0],
            anchor_weight=weight,
        )
        for weight in (0.0, 0.5)
    )
    assert float(loss_of(plain, "student", batch)[0].detach()) == pytest.approx((4 + 1) / 2 / 2)
    assert float(loss_of(anchored, "student", batch)[0].detach()) == pytest.approx(5 / 4 + 0.5 * 4 / 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "policy"}, "needs steps with noise"),
        ({"estimator": "policy", "eta": 0.5, "measured": "x0"}, "needs steps with noise"),
        ({"anchor_weight": 0.1}, "name further ones in teachers"),
        ({"guidance_of": {"night": 2.0}}, "night, which is none of the teachers .teacher.: name it"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        between(Affine(0.0, 0.0), Affine(0.0, 0.0), **options)
    assert "\n" not in str(caught.value)


def test_the_advantage_is_clipped() -> None:
    """No sample's gradient in the mean is longer than the clip times that of its own density."""
    method = between(Affine(0.3, 0.5), Affine(3.0, 0.8), eta=0.6, estimator="policy", advantage_clip=0.25)
    batch = toy_batch(64)
    visit = visits(method.student, method.sampler(), batch, batch.cond, 0.6)[0]
    target = method.teacher.predict(visit.x, visit.t, Condition())
    own = method.student.predict(visit.x, visit.t, Condition())
    x0 = own.x0.detach().requires_grad_()
    own = replace(own, x0=x0, eps=visit.x)  # at pure noise
    (slope,) = torch.autograd.grad(method.surrogate(own, target, visit).sum(), x0, retain_graph=True)
    (density,) = torch.autograd.grad(log_density(visit, method.mean(own, visit)).sum(), x0)
    factor = (slope / density).abs().flatten(1)
    torch.testing.assert_close(factor[:, 0], factor[:, 1])
    assert float(factor.max()) == pytest.approx(0.25, rel=1e-3)


def test_a_warm_start_is_by_regression_with_its_own_rate() -> None:
    method = between(Affine(0.0, 0.0), Affine(2.0, 0.0), (1.0,), warm_start=4, warm_start_lr_ratio=10.0)
    batch = toy_batch(8, pairs=lambda z: z + 3.0)
    loss, _ = loss_of(method, Turn("student", 1), batch)
    assert batch.pairs is not None
    torch.testing.assert_close(loss.detach(), batch.pairs.x0.square().mean())
    assert method.lr_ratio(Turn("student", 0)) == 10.0 and method.lr_ratio(Turn("student", 4)) == 1.0
    assert [method.phase(step) for step in (3, 4)] == ["warm start", "on-policy"]


@pytest.mark.parametrize("renoise", [False, True])
def test_a_warm_start_follows_the_trajectory_of_the_pairs(renoise: bool) -> None:
    """A student that is the teacher has nothing to learn from states of its steps; from their common end it has, and
    that is what steps with fresh noise need."""
    teacher = Affine(0.3, 0.5)
    method = between(Affine(0.3, 0.5), teacher, warm_start=4, renoise=renoise)
    batch = toy_batch(16, pairs=lambda z: z)
    assert batch.pairs is not None and batch.pairs.noise is not None
    times = (*TIMES, 0.0)
    line = list(
        trajectory(lambda x, t: method.teacher.predict(x, t, Condition()), batch.pairs.noise, times, "ddim")
    )
    batch = replace(batch, pairs=replace(batch.pairs, x0=line[-1], states=torch.stack(line[:-1], 1)))
    loss = float(loss_of(method, Turn("student", 1), batch)[0].detach())
    assert loss > 0.01 if renoise else loss == pytest.approx(0, abs=1e-9)


def test_how_far_both_are_apart_is_logged_as_a_root_mean_square_over_the_visits() -> None:
    method, batch = between(Affine(0.3, 0.5), Affine(0.1, 0.6)), toy_batch(16)
    with torch.no_grad():
        logs = method.loss(Turn("student", 0), batch).logs
        squares = [
            (
                method.student.predict(visit.x, visit.t, batch.cond).x0
                - method.target(visit, batch, method.roles.route).x0
            ).square()
            for visit in visits(method.student, method.sampler(), batch, batch.cond, method.eta)
        ]
    assert float(logs["apart"]) == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-5)
