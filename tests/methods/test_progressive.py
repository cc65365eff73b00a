"""Progressive distillation on Gaussians: one step that is several, and stages that hand on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from stepdistill.diffusion.path import FlowPath, TrigPath, per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Turn
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    Gaussian,
    GaussianMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)


def method_of(path, net=None, times=(1.0,), student=None, unguided=None, **options):
    teacher = ToyTeacher(net or Gaussian(path, 0.7, 0.6), path, unguided=unguided)
    own = toy_student(student or Gaussian(path, 0.7, 0.6), path)
    return Progressive(Copies(teacher, own), times, Progressive.Options(**options))


def batch_of(count=64):
    return toy_batch(count, pairs=lambda z: 0.7 + 0.6 * z)


def steps_of(method, start, times):
    """DDIM steps of the teacher from times[0] over the others."""
    for t, s in pairwise(times):
        start = method.teacher.predict(start, t, Condition()).at(s)
    return start


@pytest.mark.parametrize(
    "path", [FlowPath(), FlowPath(shift=3.0), TrigPath()], ids=["flow", "shifted", "trig"]
)
@pytest.mark.parametrize("ratio", [2, 4])
def test_one_step_with_the_target_ends_where_the_teachers_steps_end(path, ratio):
    """alpha_s x0 + sigma_s eps of the target is the teacher's last state, at every time of the grid."""
    method = method_of(path, times=(1.0, 0.5), ratios=(ratio, 3))
    start, target, t, s, _ = method.lesson(batch_of(), 0)
    assert len(set(t.tolist())) == 6 and float(s.min()) == 0.0
    even_t, even_s = path.unshifted(t), path.unshifted(s)
    between = [path.shifted(torch.lerp(even_t, even_s, k / ratio)) for k in range(1, ratio)]
    end = steps_of(method, start, [t, *between, s])
    (alpha, sigma), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    eps = (start - per_sample(alpha, start) * target) / per_sample(sigma, start)
    jumped = per_sample(alpha_s, start) * target + per_sample(sigma_s, start) * eps
    torch.testing.assert_close(jumped, end, rtol=1e-4, atol=2e-5)
    last = s == 0  # the end itself
    torch.testing.assert_close(target[last], end[last], rtol=1e-5, atol=1e-5)


def test_on_the_straight_path_the_target_is_the_mean_of_both_velocities():
    path = FlowPath()
    method = method_of(path, times=(1.0, 0.5), ratios=(2,))
    start, target, t, s, _ = method.lesson(batch_of(), 0)
    first = method.teacher.predict(start, t, Condition())
    middle = (t + s) / 2
    second = method.teacher.predict(first.at(middle), middle, Condition())
    mean = (first.velocity + second.velocity) / 2
    torch.testing.assert_close((start - target) / per_sample(t, start), mean, rtol=1e-4, atol=1e-5)


def test_twice_the_steps_halve_the_error_of_the_end():
    """Against the exact map of the Gaussian: DDIM is of first order."""
    path = TrigPath()
    errors = []
    for ratio in (8, 16):
        method = method_of(path, ratios=(ratio,))
        start, target, t, _, _ = method.lesson(batch_of(), 0)
        exact = GaussianMap(path, 0.7, 0.6)(start, t, Condition())
        errors.append(float((target - exact).detach().abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)


def test_a_student_whose_steps_are_straight_has_nothing_to_learn():
    """A teacher that knows one sample alone: every step ends on the same line."""
    path = TrigPath()
    method = method_of(path, Gaussian(path, 0.7, 0.0), (1.0, 0.5), Gaussian(path, 0.7, 0.0), ratios=(2, 2))
    assert float(loss_of(method, Turn("student", 0), batch_of())[0].detach()) < 1e-10


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one"])
def test_the_weight_is_as_stated(weighting):
    path = TrigPath()
    method = method_of(
        path, times=(1.0, 0.25), student=Gaussian(path, 0.2, 0.9), ratios=(2,), weighting=weighting
    )
    batch = batch_of()
    start, target, t, _, cond = method.lesson(batch, 0)
    error = method.student.predict(start, t, cond).x0 - target
    snr = (1 / torch.tan(t * torch.pi / 2)).square()
    weight = torch.maximum(snr, torch.ones(())) if weighting == "truncated_snr" else snr + 1
    expected = (weight[:, None, None, None] * error.square()).mean()
    torch.testing.assert_close(loss_of(method, Turn("student", 0), batch)[0], expected, rtol=1e-4, atol=1e-6)
    if weighting == "snr_plus_one":  # the squared error in v
        sigma = path.alpha_sigma(t)[1]
        in_v = (error / per_sample(sigma, error)).square().mean()
        torch.testing.assert_close(expected, in_v, rtol=1e-4, atol=1e-6)


def test_stages_halve_the_steps_on_nested_grids_and_end_at_the_students_times():
    method = method_of(FlowPath(shift=3.0), times=(1.0, 0.6), ratios=(4, 2, 2), stage_updates=10)
    assert [method.phase(step) for step in (0, 9, 10, 19, 20, 500)] == ["8 steps"] * 2 + ["4 steps"] * 2 + [
        "2 steps"
    ] * 2
    assert [method.sampler_at(step).steps for step in (9, 10, 20)] == [
        8,
        4,
        2,
    ]  # what is looked at draws in as many
    assert method.sampler_at(20).times == method.sampler().times
    grids = [method.grid(parts) for parts in (1, 2, 4, 16)]
    assert grids[0] == [1.0, 0.6, 0.0] and [len(grid) for grid in grids] == [3, 5, 9, 33]
    for coarse, fine in pairwise(grids):
        ratio = (len(fine) - 1) // (len(coarse) - 1)
        torch.testing.assert_close(torch.tensor(fine[::ratio]), torch.tensor(coarse))
    rates = [method.lr_ratio(Turn("student", step)) for step in (0, 5, 9, 10, 20, 999)]
    assert rates == pytest.approx([1.0, 0.5, 0.1, 1.0, 1.0, 1.0])
    assert method_of(FlowPath(), anneal=False, stage_updates=10).lr_ratio(Turn("student", 5)) == 1.0


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_student_teaches_the_next_stage_and_only_that(decay):
    path = FlowPath()
    method = method_of(path, ratios=(2, 2), stage_updates=2, teacher_decay=decay)
    mean, previous = method.student.net.mean, method.previous.net.mean
    moves = (1.0, 3.0, 7.0)
    for step, moved in enumerate(moves):
        with torch.no_grad():
            mean.fill_(moved)
        turn = Turn("student", step)
        assert bool(method.anew(turn)) == (step == 1 and decay > 0)
        method.after_step(turn)
        if step == 0:
            assert float(previous) == pytest.approx(0.7)
        elif step == 1:
            average = 0.9 * (0.9 * 0.7 + 0.1 * 1.0) + 0.1 * 3.0
            assert float(previous) == pytest.approx(average if decay else 3.0) == float(mean.detach())
    assert float(previous) != 7.0
    x, t = torch.zeros(2, 2, 1, 1), torch.full((2,), 0.5)
    assert torch.equal(method.teach(1, x, t, Condition()).x0, method.previous.predict(x, t, Condition()).x0)


def test_guidance_is_the_first_teachers_alone():
    path = FlowPath()
    method = method_of(path, unguided=Gaussian(path, 0.0, 0.6), guidance=3.0, ratios=(2, 2))
    x, t = torch.randn(4, 2, 1, 1), torch.full((4,), 0.5)
    guided = method.teacher.predict(x, t, Condition(), guidance=3.0).x0
    assert torch.equal(method.teach(0, x, t, Condition()).x0, guided)
    plain = method.teacher.predict(x, t, Condition(), guidance=1.0).x0
    torch.testing.assert_close(method.teach(1, x, t, Condition()).x0, plain)
    assert not torch.allclose(guided, plain)


def test_a_run_of_both_stages_reaches_the_composition_of_all_steps():
    """A student that can say any affine map of its noise: two stages of two end in four Euler steps of the teacher."""
    path = FlowPath()
    method = method_of(path, student=Perceptron(seed=3), ratios=(4,))
    start, target, *_ = method.lesson(batch_of(512), 0)
    grid = [torch.full((512,), time) for time in (1.0, 0.75, 0.5, 0.25, 0.0)]
    torch.testing.assert_close(target, steps_of(method, start, grid), rtol=1e-4, atol=1e-5)


def test_no_stages_are_refused():
    with pytest.raises(UserError, match=r"options.ratios is empty"):
        method_of(FlowPath(), ratios=())
