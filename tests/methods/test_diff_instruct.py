"""Diff-Instruct against closed forms on Gaussians (cards B1, B2 and its own tests)."""

from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import views_of
from stepdistill.methods.diff_instruct import DiffInstruct
from stepdistill.methods.dmd import DMD
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.sid import SiD
from stepdistill.methods.sim import SIM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.8
PATHS = [FlowPath(), TrigPath()]


def method_of(kind, path, shift, scale, **options):
    """A Gaussian teacher, an affine student and a fake network that is exact for it."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = kind(Copies(teacher, toy_student(Affine(shift, scale), path)), (1.0,), kind.Options(**options))
    method.fake.net = Gaussian(path, shift, scale)
    return method


@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_a_mean_shift(path):
    """With equal deviations dL/dm is the mean of (m - mu) sigma^2 / V over the times drawn; zero at m = mu."""
    for shift in (0.3, 0.0, -0.3):
        method, batch = method_of(DiffInstruct, path, MU + shift, S), toy_batch(64)
        loss_of(method, "student", batch)[0].backward()
        alpha, sigma = path.alpha_sigma(batch.draws.uniform("score t", 0.02, 0.98))
        expected = (shift * sigma**2 / (alpha**2 * S**2 + sigma**2)).mean()
        assert float(method.student.net.shift.grad) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("time", [0.3, 0.7])
def test_unit_weight_is_the_gradient_of_the_kl(path, time):
    """With w = 1 at one time: dKL/dm = alpha^2 (m - mu) / V_r and dKL/dk = alpha^2 k (1/V_r - 1/V_f) (card B2)."""
    m, k = MU - 0.4, 1.1
    method = method_of(DiffInstruct, path, m, k, weight="kl", score_times=(time, time))
    batch = toy_batch(20_000)
    with torch.no_grad():
        field = method.field(method.generate(batch), batch)
    alpha, sigma = (float(value) for value in path.alpha_sigma(torch.tensor(time)))
    real, fake = (alpha**2 * s**2 + sigma**2 for s in (S, k))
    tolerance = 0.03 * alpha**2 / sigma**2
    assert float(field.mean()) == pytest.approx(alpha**2 * (m - MU) / real, abs=tolerance)
    by_scale = float((field * batch.noise).mean())
    assert by_scale == pytest.approx(alpha**2 * k * (1 / real - 1 / fake), abs=tolerance)


def test_dmd_is_this_field_over_a_normaliser():
    """The two methods see the same (t, eps), and DMD divides the field by mean|x - x0_real|."""
    method, dmd = (method_of(kind, FlowPath(), 0.1, 1.2, guidance=1.0) for kind in (DiffInstruct, DMD))
    batch = toy_batch(32)
    with torch.no_grad():
        x = method.generate(batch)
        views = views_of(method.fake, method.teacher, x, batch, method.options, 1.0)
        torch.testing.assert_close(method.field(x, batch), dmd.field(x, batch) * (views.distance + 1e-6))


def test_field_is_bitwise_zero_at_the_start():
    """The fake network starts as the teacher: equal weights see equal things."""
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    student = toy_student(Perceptron(seed=1), path, "velocity")
    method = DiffInstruct(Copies(teacher, student), (1.0, 0.5), DiffInstruct.Options())
    batch = toy_batch(16)
    assert float(method.field(method.generate(batch), batch).abs().max()) == 0.0


def test_training_brings_a_gaussian_student_home():
    """Alternating updates, the fake network learning too, at a falling rate: mean and deviation come within 0.12 and
    0.1. Of five seeds the worst are 0.05 and 0.07 away."""
    method = method_of(DiffInstruct, FlowPath(), -0.5, 0.3)
    networks = modules_of(method)
    networks["fake"].requires_grad_(True)
    optimizers = {k: torch.optim.Adam(net.parameters(), betas=(0.5, 0.9)) for k, net in networks.items()}
    for step in range(600):
        turn = method.turn(step).network
        assert turn == ("fake", "student")[step % 2]
        optimizers[turn].param_groups[0]["lr"] = 0.03 * (1 - step / 600)
        optimizers[turn].zero_grad()
        loss_of(method, turn, toy_batch(128, step))[0].backward()
        optimizers[turn].step()
    assert method.student.net.shift.item() == pytest.approx(MU, abs=0.12)
    assert abs(method.student.net.scale.item()) == pytest.approx(S, abs=0.1)


def test_asks_for_noise_and_prompts_alone():
    assert DiffInstruct.Options().needs == {"noise", "prompts"}
    assert toy_batch(2).noise.shape == (2, *SHAPE)


@pytest.mark.parametrize("kind", [DiffInstruct, DMD, FDistill, SiD, SIM])
def test_every_score_method_may_start_by_regression_on_pairs(kind):
    """Then its first updates are the student's, on |G(noise) - x|^2, zero at the pairs' own map; off by default."""
    path = FlowPath()
    teacher = ToyTeacher(Perceptron(), path, "velocity")
    options = kind.Options(warm_start=3, warm_start_lr_ratio=8.0, fake_warm_start=1)
    method = kind(Copies(teacher, toy_student(Affine(MU, S), path)), (1.0,), options)
    assert options.needs >= {"pairs", "states"} and not kind.Options().needs & {
        "pairs",
        "states",
    }
    assert [method.turn(step).network for step in range(5)] == ["student"] * 3 + ["fake"] * 2
    assert [method.lr_ratio(Turn("student", step)) for step in (0, 3)] == [8.0, 1.0]
    loss, _ = loss_of(method, "student", toy_batch(8, 2, pairs=lambda z: MU + S * z))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    loss, _ = loss_of(method, "student", toy_batch(8, 2, pairs=lambda z: MU + 0.5 + S * z))
    assert float(loss.detach()) == pytest.approx(0.25, rel=1e-5)
