"""Consistency distillation against closed forms: orders, schedules of levels, boundary, target network."""

from __future__ import annotations

import math

import pytest
import torch
from consistency_toy import error, mixture_method, table_path, train

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import EDMPath, FlowPath, TrigPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.consistency import Target, consistency_function, last_time, lognormal_law
from stepdistill.losses.distances import pseudo_huber
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.roles import Copies
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
PATHS = [FlowPath(), TrigPath(), table_path()]
NAMES = ["flow", "trig", "table"]


def consistency(path, student, **options):
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    return Consistency(Copies(teacher, toy_student(student, path)), (1.0,), Consistency.Options(**options))


def data_batch(count=512, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


@pytest.mark.parametrize(("solver", "ratio"), [("heun", 64), ("ddim", 16), ("none", 4)])
@pytest.mark.parametrize("path", PATHS[:2], ids=NAMES[:2])
def test_squared_residual_at_the_exact_map_has_the_order_of_the_solver(path, solver, ratio):
    """h^6 for Heun, h^4 for DDIM, and h^2 (the noise of the pair) without a teacher (card, test G3)."""
    squares = []
    for grid in (40, 80):
        method = consistency(path, GaussianMap(path, MU, S), solver=solver, grid=grid, rho=3.0)
        squares.append(float(loss_of(method, "student", data_batch(4096))[1]["residual"]) ** 2)
    coarse, fine = squares
    assert 0.6 * ratio < coarse / fine < 1.6 * ratio


@pytest.mark.parametrize("solver", ["heun", "ddim", "none"])
def test_loss_is_zero_on_a_point_mass(solver):
    path = FlowPath()
    teacher = ToyTeacher(Gaussian(path, MU, 0.0), path)
    student = toy_student(GaussianMap(path, MU, 0.0), path)
    method = Consistency(Copies(teacher, student), (1.0,), Consistency.Options(solver=solver))
    batch = toy_batch(256, pairs=lambda z: torch.full_like(z, MU))
    assert float(loss_of(method, "student", batch)[1]["residual"]) < 2e-6


def test_distillation_and_training_have_one_expected_gradient_for_a_linear_f():
    """Where f is linear in x the noise of the pair averages out: with squared losses and neighbours close together the
    mean gradients agree (card 2.1)."""
    path, gradients = FlowPath(), {}
    for solver in ("ddim", "none"):
        method = consistency(
            path, GaussianMap(path, MU, S), solver=solver, grid=80, rho=3.0, huber=None, target_decay=0.0
        )
        with torch.no_grad():
            method.student.net.deviation.add_(0.2)
        loss_of(method, "student", data_batch(20_000))[0].backward()
        gradients[solver] = float(method.student.net.deviation.grad)
    assert gradients["none"] == pytest.approx(gradients["ddim"], rel=0.1)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_grid_runs_from_the_boundary_to_pure_noise(path):
    method = consistency(path, GaussianMap(path, MU, S))
    t = method.time_of(method.grid(0))
    assert len(t) == 18
    assert float(t[0]) == pytest.approx(last_time(path))
    assert float(t[-1]) == 1.0
    assert bool((t.diff() > 0).all())


def test_levels_are_those_of_the_cm_scheduler():
    """Karras' grid of 40 levels is CMStochasticIterativeScheduler's; its index 22 is 1.382 (card 2.1)."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    method = consistency(EDMPath(80.0), GaussianMap(EDMPath(80.0), MU, S), grid=39)
    levels = method.grid(0).flip(0)
    assert float(levels[22]) == pytest.approx(1.382, abs=1e-3)
    scheduler.set_timesteps(40)
    torch.testing.assert_close(levels, scheduler.sigmas[:40].float(), rtol=1e-4, atol=1e-5)


def test_the_curriculum_of_ict():
    """N = 11, 21, 41, ..., 1281 over 400,000 updates, doubling every 50,000 (card 2.2)."""
    path = FlowPath()
    method = consistency(path, GaussianMap(path, MU, S), grid=10, double_every=50_000)
    sizes = [len(method.grid(step)) for step in range(0, 400_000, 50_000)]
    assert sizes == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert len(method.grid(4_000_000)) == 1281


def test_the_index_law_of_ict_is_lognormal():
    path = TrigPath()
    method = consistency(path, GaussianMap(path, MU, S), grid=320, law="lognormal")
    grid = method.grid(0)
    law = lognormal_law(grid, -1.1, 2.0)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    log = (grid[1:] * grid[:-1]).log() / 2
    mean = float((law * log).sum())
    assert mean == pytest.approx(-1.1, abs=0.1)
    assert float((law * (log - mean).square()).sum()) ** 0.5 == pytest.approx(2.0, abs=0.1)
    upper, lower = method.levels(data_batch(4000), 0)
    assert bool((upper > lower).all())
    assert float(((upper * lower).log() / 2).mean()) == pytest.approx(mean, abs=4 * 2 / 4000**0.5)


def test_one_interval_of_the_grid_is_as_likely_as_another():
    path = FlowPath()
    method = consistency(path, GaussianMap(path, MU, S), grid=5)
    grid = method.grid(0)
    upper, lower = method.levels(data_batch(4000), 0)
    i = torch.searchsorted(grid, lower)
    assert torch.equal(grid[i], lower) and torch.equal(grid[i + 1], upper)
    drawn = torch.bincount(i, minlength=5)
    assert len(drawn) == 5
    assert float((drawn - 800).abs().max()) < 4 * 800**0.5


def test_the_schedule_of_ect():
    """Stage 0: r = 0 for small t and t / 2 for large; stage 7: r / t = 0.996 (card 2.3)."""
    path = EDMPath()
    method = consistency(
        path, GaussianMap(path, MU, S), curriculum="ect", double_every=100, log_mean=0.0, log_deviation=3.0
    )
    t, r = method.levels(data_batch(2000, step=0), 0)
    assert bool((r >= 0).all()) and bool((r < t).all())
    assert bool((r[t < 0.5] == 0).all())
    torch.testing.assert_close(r[t > 15], t[t > 15] / 2, rtol=1e-5, atol=0)
    t, r = method.levels(data_batch(2000, step=700), 700)
    assert bool(((r / t)[t > 10] - 0.996).abs().max() < 1e-3)


def test_the_greatest_draw_still_has_an_interval():
    """The probabilities of the lognormal law add up to a little less than 1 in float32; a draw may lie above."""

    class Greatest(Draws):
        def uniform(self, stream, low=0.0, high=1.0):
            return torch.full((self.count,), 1 - 2**-24 if stream == "interval" else 0.5)

    path = FlowPath()
    for grid in range(5, 60):
        method = consistency(path, GaussianMap(path, MU, S), grid=grid, law="lognormal")
        upper, lower = method.levels(Batch(Greatest(0, 0, 0, 4), SHAPE, Condition(), torch.zeros(4)), 0)
        assert bool((upper == method.high).all()) and bool((lower < upper).all())


def test_levels_of_ect_keep_within_the_path():
    """From twice the boundary's level, so that a lower one is left, to pure noise, where a share of samples is put."""
    path = table_path()
    method = consistency(
        path, GaussianMap(path, MU, S), curriculum="ect", log_mean=0.0, log_deviation=6.0, noise_share=0.25
    )
    upper, lower = method.levels(data_batch(4000), 0)
    assert method.low > 0
    assert float(upper.min()) == pytest.approx(2 * method.low)
    assert float(upper.max()) == pytest.approx(method.high)
    assert float(lower.min()) == pytest.approx(method.low)
    assert bool((lower < upper).all())
    log = math.log(method.high) / 6  # in deviations of the draw: what lies above it is put there too
    above = 0.5 * math.erfc(log / 2**0.5)
    share = 0.25 + 0.75 * above
    drawn = float((upper == upper.max()).float().mean())
    assert drawn == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_without_a_weight_the_loss_is_the_mean_square_of_the_residual():
    path = FlowPath()
    method = consistency(path, Perceptron(), huber=None, weight=False)
    loss, logs = loss_of(method, "student", data_batch(32))
    assert loss.item() == pytest.approx(float(logs["residual"]) ** 2, rel=1e-5)


def test_ect_with_the_whole_gap_is_the_denoising_loss():
    path = FlowPath()
    method = consistency(
        path, Perceptron(), curriculum="ect", solver="none", q=1e-6, huber=None, target_decay=0.0, weight=True
    )
    batch = data_batch()
    upper, lower = method.levels(batch, 0)
    assert not bool(lower.any())
    t, x0 = method.time_of(upper), batch.pairs.x0
    x_t = path.noised(x0, batch.draws.normal("eps", SHAPE), t)
    denoising = (method.student.predict(x_t, t, batch.cond).x0 - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(
        loss_of(method, "student", batch)[0], (denoising / upper).mean(), rtol=1e-4, atol=1e-4
    )


def test_weighted_training_residuals_do_not_depend_on_the_grid():
    """A student off the exact map by a function of t alone has a residual like the gap: 1 / (t - r) cancels it."""
    path, losses = TrigPath(), []
    for grid in (160, 320):
        method = consistency(
            path, Gaussian(path, MU, S), grid=grid, huber=0.0, weight=True, target_decay=0.0, law="lognormal"
        )
        losses.append(float(loss_of(method, "student", data_batch(2000))[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_boundary_is_the_identity_and_has_no_gradient(path):
    """Card, test G1."""
    student = toy_student(Perceptron(), path, "velocity")
    z = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    out = consistency_function(student, z, torch.full((8,), last_time(path)), toy_batch(8).cond)
    torch.testing.assert_close(out, z, atol=0, rtol=0)
    out.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.net.parameters())


def test_pseudo_huber_is_a_norm_far_out_and_a_square_close_by():
    r = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    norm = r.flatten(1).norm(dim=1)
    torch.testing.assert_close(pseudo_huber(r, 0.0), norm)
    torch.testing.assert_close(pseudo_huber(100 * r, 0.03), 100 * norm, rtol=1e-2, atol=0.1)
    c = 10.0 * math.sqrt(2)
    torch.testing.assert_close(pseudo_huber(r, 10.0), norm.square() / (2 * c), rtol=0.02, atol=1e-5)
    zero = torch.zeros(3, *SHAPE, requires_grad=True)
    pseudo_huber(zero, 0.0).sum().backward()
    assert not zero.grad.any()


def test_target_is_an_average_or_the_student_without_gradient():
    path = FlowPath()
    student = toy_student(GaussianMap(path, MU, S), path)
    roles = Copies(ToyTeacher(Gaussian(path, MU, S), path), student)
    average, same = Target(roles, 0.9), Target(roles, 0.0)
    with torch.no_grad():
        student.net.mean.fill_(MU + 1)
    average.update()
    same.update()
    assert float(average.denoiser.net.mean) == pytest.approx(MU + 0.1)
    assert same.denoiser is student
    assert roles.names == ("student", "target")
    # The gradient with the student as its own target is that with the target as a fixed copy.
    gradients = []
    for decay in (0.0, 0.5):
        method = consistency(path, Gaussian(path, MU, S), target_decay=decay)
        loss_of(method, "student", data_batch())[0].backward()
        gradients.append(method.student.net.deviation.grad)
        assert method.teacher.denoiser.net.mean.grad is None
    assert torch.equal(*gradients)


NARROW = {"sigma_max": 10.0, "log_mean": 0.0, "log_deviation": 1.2, "target_decay": 0.0, "weight": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**NARROW, "curriculum": "ect", "double_every": 100, "solver": "ddim"},
        {
            **NARROW,
            "sigma_min": 0.02,
            "grid": 10,
            "double_every": 150,
            "law": "lognormal",
            "solver": "none",
            "huber": 0.05,
        },
    ],
    ids=["cd", "ect", "ict"],
)
def test_training_brings_one_step_to_the_end_of_the_ode(options):
    """From the teacher's own x0 at pure noise, the mean of the mixture, to the clean end of each noise's trajectory."""
    method = mixture_method(Consistency, source="images", noise_share=0.2, **options)
    before = error(method, 1)
    after = error(train(method, 500), 1)
    print(f"one step: {before:.3f} -> {after:.3f}")
    assert after < 0.5 * before
