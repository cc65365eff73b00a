"""Self-E between Gaussians: what is evaluated, where it counts, and which way it leads."""

from __future__ import annotations

import pytest
import torch
from flow_toy import MU, C, Twinned
from tiny import SIZES, tiny_pipeline, tiny_prompts

from stepdistill.diffusion.path import FlowPath, per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.losses.flow_maps import teacher_prediction
from stepdistill.losses.twin import TWIN, twin_prediction
from stepdistill.methods.self_e import SelfE
from stepdistill.networks.roles import Copies
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianFlowMap,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

PATH = FlowPath()
NULL = 0.2
NONE = Condition()


def method_of(net=None, null=True, times=(1.0, 0.5), **options):
    """From the exact Gaussian teacher, without a prompt of another mean, to the exact map of the first."""
    unguided = Gaussian(PATH, NULL, C) if null else None
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH, unguided=unguided)
    student = toy_student(net or GaussianFlowMap(MU, C), PATH, "velocity")
    return SelfE(Copies(teacher, student), times, SelfE.Options(guidance=1.0, **options))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + C * z)


def points(count=32):
    """Clean predictions, and times s < t."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, *SHAPE, generator=generator)
    s = torch.linspace(0.05, 0.7, count)
    return x, s + 0.2, s


def test_the_weight_is_that_of_the_noise_levels_and_zero_where_a_step_has_no_length():
    method = method_of()
    _, t, s = points()
    torch.testing.assert_close(
        method.weight(t, s), (t / (1 - t) - s / (1 - s)).clamp_max(10), rtol=1e-4, atol=1e-5
    )
    for time in (s, torch.ones(4)):
        assert float(method.weight(time, time).abs().max()) == 0
    assert float(method_of(largest_weight=3.0).weight(torch.ones(1), torch.zeros(1))) == 3


def test_where_a_step_has_no_length_there_is_the_data_term_alone():
    method, batch = method_of(same=1.0), data()
    a, b = (batch.draws.uniform(name, method.least, 1.0) for name in ("a", "b"))
    x_t, x, t, s, cond = method.points(batch, a, b)
    assert torch.equal(t, s)
    seen = x_t - per_sample(t, x_t) * method.student.flow_velocity(x_t, t, s, cond)
    loss, logs = loss_of(method, "student", batch)
    torch.testing.assert_close(loss, (seen - x).square().mean(), rtol=1e-4, atol=1e-6)
    assert float(logs["evaluation"]) == 0


def test_the_fixed_point_is_the_posterior_mean_and_guidance_inside_it():
    """x0* = E[x | x_t] + lambda s^2 / V_s (m - m0) is its own target, without the length."""
    method = method_of(renorm=False)
    x_t, t, s = points()
    mean = Gaussian(PATH, MU, C)(x_t, t, NONE)
    weight, variance = method.weight(t, s), ((1 - s) * C).square() + s.square()
    star = mean + per_sample(weight * s.square() / variance * (MU - NULL), x_t)
    x_s = PATH.noised(star, torch.randn_like(star), s)
    x_self = method.evaluated(star, x_s, s, NONE, 0)
    torch.testing.assert_close(method.target(mean, x_self, weight), star, rtol=1e-4, atol=1e-5)


def test_evaluation_scales_the_classifier_score():
    x, _, s = points()
    once, thrice = (method_of(evaluation=scale).evaluated(x, x, s, NONE, 0) - x for scale in (1.0, 3.0))
    assert float(once.mean()) > 0.01  # towards the prompt's mean
    torch.testing.assert_close(thrice, 3 * once)


def test_a_teacher_without_prompts_evaluates_to_nothing():
    method = method_of(null=False)
    x, _, s = points()
    assert torch.equal(method.evaluated(x, x, s, NONE, 0), x)
    assert float(loss_of(method, "student", data())[1]["evaluation"]) == 0


def test_the_target_is_as_long_as_the_data():
    method = method_of()
    x, t, s = points()
    target = method.target(x, x.flip(0) + 0.4, method.weight(t, s))
    torch.testing.assert_close(target.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert not torch.allclose(target, x)
    data, other = torch.randn(2, len(t), 2, 3, 3, generator=torch.Generator().manual_seed(0))
    target = method.target(data, other, method.weight(t, s))
    torch.testing.assert_close(target.flatten(1).norm(dim=1), data.flatten(1).norm(dim=1))


def test_no_gradient_runs_through_what_evaluates():
    """The student's gradient is that of its distance to a constant."""
    method, batch = method_of(net=Twinned(1.1, C), auxiliary_after=0, same=0.0), data()
    a, b = (batch.draws.uniform(name, method.least, 1.0) for name in ("a", "b"))
    x_t, x, t, s, cond = method.points(batch, a, b)
    seen = x_t - per_sample(t, x_t) * method.student.flow_velocity(x_t, t, s, cond)
    x_s = PATH.noised(seen.detach(), batch.draws.normal("self eps", SHAPE), s)
    with torch.no_grad():
        target = method.target(x, method.evaluated(seen, x_s, s, cond, 0), method.weight(t, s))
    apart = (seen.detach() - x).square().mean()
    torch.testing.assert_close(loss_of(method, "student", batch)[1]["data"], apart)
    own = (twin_prediction(method.student, x_s, s, cond).x0 - seen.detach()).square().mean()
    mean = method.student.net.mean
    wanted = torch.autograd.grad((seen - target).square().mean() + own, mean)[0]
    torch.testing.assert_close(torch.autograd.grad(loss_of(method, "student", batch)[0], mean)[0], wanted)


@pytest.mark.parametrize("shift", [0.4, 0.0, -0.4])
def test_the_auxiliary_term_takes_a_shift_of_the_students_samples_back(shift):
    """With an exact twin and no prompt, x_self - x = s^2 / V_s (m - m_own): home, and nothing at home."""
    method = method_of(net=Twinned(MU + shift, C), null=False, auxiliary_after=0)
    x, _, s = points()
    variance = ((1 - s) * C).square() + s.square()
    moved = method.evaluated(x, x, s, NONE, 0) - x
    wanted = per_sample(-shift * s.square() / variance, x).expand_as(x)
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-5)
    half = method_of(net=Twinned(MU + shift, C), null=False, auxiliary_after=0, auxiliary=0.5)
    torch.testing.assert_close(2 * (half.evaluated(x, x, s, NONE, 0) - x), moved, rtol=1e-4, atol=1e-5)


def test_a_teacher_with_an_embedded_scale_evaluates_at_that_of_the_recipe():
    """There is no mode without a prompt: what is left is the guided field of the teacher and the student's twin."""
    teacher = PipelineTeacher(tiny_pipeline("flux"), size=SIZES["flux"], guidance=3.5)
    options = SelfE.Options(guidance=3.5, auxiliary_after=0, auxiliary=0.5)
    method = SelfE(Copies(teacher), (1.0, 0.5), options)
    generator = torch.Generator().manual_seed(3)
    x, x_s = (torch.randn(2, *teacher.codec.shape, generator=generator) for _ in range(2))
    s, cond = torch.tensor([0.6, 0.3]), teacher.codec.encode(tiny_prompts("flux", 2))
    found = method.evaluated(x, x_s, s, cond, 0)
    real = teacher_prediction(teacher, x_s, s, cond, 3.5).x0
    twin = twin_prediction(method.student, x_s, s, cond).x0
    torch.testing.assert_close(found, x + 0.5 * (real - twin))
    assert float((real - teacher_prediction(teacher, x_s, s, cond, 1.0).x0).abs().max()) > 0.05


def test_at_the_teachers_guidance_both_parts_are_the_guided_field():
    """G(no prompt) + g (G(prompt) - G(no prompt)) - F: DMD's, with the twin in the place of its fake score."""
    method = method_of(net=Twinned(1.1, 0.7), auxiliary_after=0, evaluation=2.5)
    x, _, s = points()
    guided = method.teacher.predict(x, s, NONE, guidance=2.5).x0
    own = twin_prediction(method.student, x, s, NONE).x0
    torch.testing.assert_close(method.evaluated(x, x, s, NONE, 0) - x, guided - own, rtol=1e-4, atol=1e-5)


def test_the_twin_is_told_by_a_length_that_no_jump_has_and_learns_the_students_predictions():
    seen = []
    method = method_of(net=Twinned(MU, C), auxiliary_after=5)
    method.student.net.register_forward_pre_hook(lambda net, given: seen.append(given[2]["gap"]))
    loss, logs = loss_of(method, "student", data())
    assert float(seen[0].min()) >= 0 and float((seen[-1] - TWIN).abs().max()) < 1e-6
    assert len(seen) == 2 and not method.compares(4) and method.compares(5)
    plain = loss_of(method_of(net=Twinned(MU, C)), "student", data())[0]
    torch.testing.assert_close(loss, plain + logs["own"])
    loss, logs = loss_of(method_of(net=Twinned(MU, C), auxiliary_after=5, warm_start=1), "student", data())
    torch.testing.assert_close(loss, logs["data"] + logs["own"])


def test_the_warm_start_is_the_data_term_at_any_end_and_coupled_data_have_the_pairs_own_noise():
    """Then x_t is on the line between the pair's ends, and a student that knows the pairs is at home."""
    method, batch = method_of(warm_start=2, coupled=True, noise_share=0.5, pair_distance="l1"), data()
    a, b = (batch.draws.uniform(name, method.least, 1.0) for name in ("a", "b"))
    z = batch.pairs.noise
    x_t, x, t, s, cond = method.points(batch, a, b, z)
    torch.testing.assert_close(x_t, PATH.noised(x, z, t))
    seen = x_t - per_sample(t, x_t) * method.student.flow_velocity(x_t, t, s, cond)
    loss, logs = loss_of(method, "student", batch)
    torch.testing.assert_close(loss, (seen - x).abs().mean())
    assert set(logs) == {"data"} and "evaluation" in loss_of(method, Turn("student", 2), batch)[1]
    assert [method_of(warm_start=2, auxiliary_after=3).phase(step) for step in (1, 2, 5)] == [
        "warm start",
        "evaluation",
        "evaluation, auxiliary",
    ]


def test_what_cannot_be_is_said():
    with pytest.raises(
        UserError, match=r"options.coupled takes the noise of pairs, but options.source is images"
    ):
        method_of(source="images", coupled=True)
    teacher = ToyTeacher(Gaussian(PATH, MU, C), PATH)
    teacher.has_null = False
    student = toy_student(Twinned(MU, C), PATH, "velocity")
    with pytest.raises(UserError, match=r"no unconditional mode: set options.auxiliary_after"):
        SelfE(Copies(teacher, student), (1.0,), SelfE.Options())
    method = SelfE(Copies(teacher, student), (1.0,), SelfE.Options(auxiliary_after=0))
    x, _, s = points()
    assert float((method.evaluated(x, x, s, NONE, 0) - x).abs().max()) < 1e-5  # the twin is the teacher
    assert SelfE.Options(warm_start=5, source="images").needs == {"noise", "prompts", "images"}
    assert SelfE.Options(source="student").needs == {"noise", "prompts"}
