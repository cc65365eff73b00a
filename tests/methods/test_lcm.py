"""LCM against closed forms: exact maps, solver order, boundary, guidance in the ODE."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import shaken, tiny_pipeline, tiny_prompts

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath, TablePath, TrigPath
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.consistency import consistency_function
from stepdistill.methods.lcm import LCM
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.4


def table_path():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return TablePath.from_alphas_cumprod(torch.cumprod(1 - betas, 0))


def lcm(path, student, unguided=None, **options):
    teacher = ToyTeacher(Gaussian(path, MU, S), path, unguided=unguided)
    return LCM(
        Copies(teacher, toy_student(student, path)), (1.0,), LCM.Options(**{"guidance": 1.0, **options})
    )


def data_batch(count=512, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


def test_loss_is_zero_where_the_solver_is_exact():
    """A point mass: every DDIM step is exact, so the exact map has no residual."""
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, 0.0), path)
    method = LCM(
        Copies(teacher, toy_student(GaussianMap(path, MU, 0.0), path)),
        (1.0,),
        LCM.Options(grid=10, guidance=1.0),
    )
    batch = toy_batch(256, pairs=lambda z: torch.full_like(z, MU))
    assert float(loss_of(method, "student", batch)[1]["residual"]) < 1e-6


@pytest.mark.parametrize("path", [FlowPath(), TrigPath()])
def test_squared_residual_falls_with_the_fourth_power_of_the_step(path):
    """At the exact map the residual is one DDIM step's local error, O(h^2): squared, 16 times less for half the step
    (card, test G3). A pair built from the data instead of the teacher would give a factor 4."""
    squares = []
    for grid in (20, 40, 80):
        method = lcm(path, GaussianMap(path, MU, S), grid=grid)
        squares.append(float(loss_of(method, "student", data_batch(4096))[1]["residual"]) ** 2)
    for coarse, fine in pairwise(squares):
        assert 11 < coarse / fine < 22


def test_loss_at_the_exact_map_has_a_gradient_that_vanishes_with_the_step():
    """The residual is O(h^2), and so is the gradient where the distance is a square (c far above it): four times less
    for half the step. It does not vanish beside the exact map."""
    path, sizes = FlowPath(), []
    for grid in (20, 40, 80):
        method = lcm(path, GaussianMap(path, MU, S), grid=grid, huber=10.0)
        loss_of(method, "student", data_batch(4096))[0].backward()
        sizes.append(abs(float(method.student.net.deviation.grad)))
    for coarse, fine in pairwise(sizes):
        assert 3 < coarse / fine < 5.5
    beside = lcm(path, GaussianMap(path, MU, S + 0.1), grid=80, huber=10.0)
    loss_of(beside, "student", data_batch(4096))[0].backward()
    assert abs(float(beside.student.net.deviation.grad)) > 10 * sizes[-1]


def test_a_drawn_guidance_need_not_be_embedded():
    """The SDXL script and LCM-LoRA: the teacher's step has the drawn scale, the student is as it was; a LoRA may."""
    path = FlowPath()
    options = {"guidance": 2.5, "guidance_range": (1.0, 4.0), "embed_guidance": False}
    method = lcm(path, GaussianMap(path, MU, S), unguided=Gaussian(path, 0.2, S), **options)
    assert method.sampler().guidance is None
    fixed = lcm(path, GaussianMap(path, MU, S), unguided=Gaussian(path, 0.2, S), guidance=2.5)
    residuals = [float(loss_of(each, "student", data_batch())[1]["residual"]) for each in (method, fixed)]
    assert residuals[0] != pytest.approx(residuals[1], rel=0.01)
    real = PipelineTeacher(tiny_pipeline("sd"))
    roles = Adapters(real, 2)
    net = roles.student.net
    LCM(roles, (1.0,), LCM.Options(**options))
    assert roles.student.net is net
    with pytest.raises(UserError, match="lora_rank"):
        LCM(Adapters(real, 2), (1.0,), LCM.Options(guidance=2.5, guidance_range=(1.0, 4.0)))


def test_boundary_is_the_identity_and_has_no_gradient():
    """f(z, timestep 0) = z for any network, and nothing of it reaches the weights (card, test G1)."""
    path = table_path()
    student = toy_student(Perceptron(), path, "eps")
    method = LCM(Copies(ToyTeacher(Gaussian(path, MU, S), path), student), (1.0,), LCM.Options(guidance=1.0))
    z = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    out = consistency_function(method.student, z, torch.full((8,), 1 / 1000), toy_batch(8).cond)
    torch.testing.assert_close(out, z, atol=0, rtol=0)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in method.student.net.parameters())


def test_scalings_are_those_of_lcm_scheduler():
    from diffusers import LCMScheduler

    path = table_path()
    method = LCM(
        Copies(ToyTeacher(Gaussian(path, MU, S), path), toy_student(Perceptron(), path, "eps")),
        (1.0,),
        LCM.Options(),
    )
    scheduler = LCMScheduler()
    z = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    for n in (0, 1, 19, 999):
        t = torch.tensor([(n + 1) / 1000])
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(n)
        expected = skip * z + out * method.student.predict(z, t, toy_batch(1).cond).x0
        torch.testing.assert_close(consistency_function(method.student, z, t, toy_batch(1).cond), expected)


def test_times_are_those_of_lcm_scheduler():
    """The grid's times, as timesteps, are 19, 39, ..., 999, and one step and four are drawn from it."""
    from diffusers import DDPMScheduler

    path = table_path()
    method = LCM(
        Copies(ToyTeacher(Gaussian(path, MU, S), path), toy_student(Perceptron(), path, "eps")),
        (1.0,),
        LCM.Options(),
    )
    teacher_scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for steps, expected in ((1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])):
        times = on_stock_grid(method.sampler(), path, teacher_scheduler, steps).times
        assert [round(t * 1000) - 1 for t in times] == expected
        grid = {round((i + 1) / 50 * 1000) - 1 for i in range(50)}
        assert set(expected) <= grid


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_is_folded_into_the_ode(guidance):
    """With equal deviations the guided ODE is that of mean u + g (c - u): its map has the small residual of the
    solver, the map of any other guidance a large one (card, test G6)."""
    path = FlowPath()
    residual = {}
    for g in (1.0, 2.5):
        mean = 0.2 + g * (MU - 0.2)
        method = lcm(
            path, GaussianMap(path, mean, S), unguided=Gaussian(path, 0.2, S), grid=50, guidance=guidance
        )
        residual[g] = float(loss_of(method, "student", data_batch())[1]["residual"])
    assert residual[guidance] < 0.1 * residual[3.5 - guidance]


def test_target_follows_by_its_decay():
    path = FlowPath()
    method = lcm(path, GaussianMap(path, MU, S), target_decay=0.9)
    with torch.no_grad():
        method.student.net.mean.fill_(MU + 1)
    method.after_step(method.turn(0))
    assert float(method.target.denoiser.net.mean) == pytest.approx(MU + 0.1)
    method.after_step(method.turn(1))
    assert float(method.target.denoiser.net.mean) == pytest.approx(MU + 0.19)


def test_target_holds_no_graph():
    path = FlowPath()
    method = lcm(path, GaussianMap(path, MU, S))
    loss_of(method, "student", data_batch(8))[0].backward()
    assert method.target.denoiser.net.mean.grad is None
    assert method.student.net.mean.grad is not None


def test_in_bf16_the_same_weights_learn_in_the_same_direction(teacher_of):
    """On a tiny Stable Diffusion under autocast, target and teacher too: the gradient points where that of float32
    does."""
    teacher, gradients = teacher_of("sd"), []
    cond, draws = teacher.codec.encode(tiny_prompts("sd", 4)), Draws(0, 3, 0, 4)
    pairs = Examples(draws.normal("x0", teacher.codec.shape), cond)
    batch = Batch(draws, teacher.codec.shape, cond, torch.zeros(draws.count), pairs=pairs)
    for enabled in (False, True):
        student = Student.from_teacher(teacher)
        shaken(student.net)
        method = LCM(Copies(teacher, student), (1.0, 0.5), LCM.Options(guidance=2.0, huber=0.1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = loss_of(method, "student", batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.net.parameters()]))
    one, other = gradients
    assert float(torch.cosine_similarity(one, other, dim=0)) > 0.98
    assert not torch.equal(one, other)
