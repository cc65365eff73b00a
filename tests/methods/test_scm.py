"""sCM against closed forms: TrigFlow read from any path, the tangent and its zeros, its derivative, its weight."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from consistency_toy import table_path
from torch import nn

from stepdistill.diffusion.path import EDMPath, FlowPath, Prediction, TrigPath, per_sample
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.families.condition import Condition
from stepdistill.losses.consistency import noised
from stepdistill.losses.continuous_time import Weight, trig_velocity
from stepdistill.methods.scm import SCM
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import (
    SHAPE,
    Gaussian,
    GaussianMap,
    Perceptron,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
)

MU, S = 0.7, 0.4
PATHS = [FlowPath(), TrigPath(), EDMPath(), table_path()]
NAMES = ["flow", "trig", "edm", "table"]


def scm(path, student, unguided=None, deviation=S, mean=MU, output="x0", **options):
    teacher = ToyTeacher(Gaussian(path, mean, deviation), path, unguided=unguided)
    chosen = {"guidance": 1.0, "tangent_warmup": 0, "derivative": "exact", **options}
    return SCM(Copies(teacher, toy_student(student, path, output)), (1.0,), SCM.Options(**chosen))


def data(count=64, step=0):
    return toy_batch(count, step, pairs=lambda z: MU + S * z)


def at(method, count=64, share=1.0):
    """Raw tangents g, what the teacher says, and angles, at points drawn as the loss draws them."""
    batch = data(count)
    t = method.drawn_times(batch.draws)
    x_t = noised(method.student.path, batch.pairs.x0, batch.draws.normal("eps", SHAPE), t)
    now = method.teacher.predict(x_t, t, Condition(), guidance=method.options.guidance)
    said = trig_velocity(method.student.predict(x_t, t, Condition())).detach()
    return method.tangent(now, said, Condition(), share), now, per_sample(method.student.path.angle(t), x_t)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_x0_and_noise_are_a_rotation_of_state_and_velocity(path):
    """x0 = cos y - sin F and eps = sin y + cos F with y = x_t / |(alpha, sigma)| (card 1.1)."""
    x0, eps = torch.randn(2, 16, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    y = path.noised(x0, eps, t) / per_sample(torch.hypot(alpha, sigma), x0)
    a, F = per_sample(path.angle(t), x0), trig_velocity(Prediction(path, x0, eps, t))
    torch.testing.assert_close(torch.cos(a) * y - torch.sin(a) * F, x0)
    torch.testing.assert_close(torch.sin(a) * y + torch.cos(a) * F, eps)


def test_a_flow_network_read_so_is_sana_sprints_wrapper():
    """F = ((1 - 2 t) x + (1 - 2 t + 2 t^2) v) / sqrt(t^2 + (1 - t)^2) (2503.09641; card 1.1)."""
    path = FlowPath()
    x, v = torch.randn(2, 16, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.0, 1.0, 16, dtype=torch.float64)
    F, t = trig_velocity(path.read(v, "velocity", x, t)), per_sample(t, x)
    wanted = ((1 - 2 * t) * x + (1 - 2 * t + 2 * t**2) * v) / (t**2 + (1 - t) ** 2).sqrt()
    torch.testing.assert_close(F, wanted)


@pytest.mark.parametrize("way", ["exact", "difference"])
@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_tangent_vanishes_at_the_exact_consistency_function_and_not_beside_it(path, way):
    """Card 1.6, G2; of a guided teacher too, whose ODE is that of the mean m0 + g (m - m0)."""
    mean = 0.2 + 2.5 * (MU - 0.2)
    method = scm(
        path,
        GaussianMap(path, mean, S),
        Gaussian(path, 0.2, S),
        guidance=2.5,
        derivative=way,
        noise_share=0.1,
    )
    exact = float(at(method)[0].square().mean().sqrt())
    with torch.no_grad():
        method.student.net.deviation += 0.1
    beside = float(at(method)[0].square().mean().sqrt())
    assert exact < (2e-5 if way == "exact" else 2e-2 * beside), (exact, beside)
    assert beside > 0.01


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_teachers_own_tangent_has_a_closed_form(path):
    """Data N(0, 1): on TrigFlow every velocity is 0, so at the student's start g = -r cos(a) sin(a) y (card 1.5)."""
    method = scm(path, Gaussian(path, 0.0, 1.0), mean=0.0, deviation=1.0)
    for share in (0.0, 0.3, 1.0):
        g, now, a = at(method, share=share)
        y = torch.cos(a) * now.x0 + torch.sin(a) * now.eps
        torch.testing.assert_close(g, -share * torch.cos(a) * torch.sin(a) * y, atol=2e-4, rtol=1e-3)


def test_the_tangent_is_the_limit_of_the_discrete_residual():
    """cos(a) (f(y, a) - f(y_b, b)) / sin(a - b), b one teacher step below a: the gap to g halves with a - b for any
    network (card, G10)."""
    path = TrigPath()
    method = scm(path, Perceptron(), output="velocity", log_deviation=0.5)
    g, now, a = at(method)
    said = method.student.predict(now.at(now.t), now.t, Condition()).x0
    gaps = []
    for h in (0.04, 0.02, 0.01):
        s = now.t - h / (math.pi / 2)
        below = method.student.predict(now.at(s), s, Condition()).x0
        gaps.append(float((torch.cos(a) * (said - below) / math.sin(h) - g).detach().norm()))
    assert gaps[0] < 0.1 * float(g.norm())
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.2) and gaps[1] / gaps[2] == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_differences_tend_to_the_exact_derivative(path):
    """Four times nearer at half the step, on a table too."""
    law = {"output": "v", "log_mean": 0.0, "log_deviation": 0.5}
    exact = at(scm(path, Perceptron(), **law))[0]
    gaps = []
    for step in (0.02, 0.01):
        method = scm(path, Perceptron(), derivative="difference", derivative_step=step, **law)
        gaps.append(float((at(method)[0] - exact).norm()))
    assert gaps[1] < 0.02 * float(exact.norm())
    assert gaps[0] > 3.5 * gaps[1]


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_differences_take_a_quarter_of_the_time_at_most_and_never_clean_data(path):
    method = scm(path, Perceptron(), derivative="difference", derivative_step=0.04)
    t = method.drawn_times(data(4000).draws)
    h = method.step(t)
    if path is PATHS[3]:
        assert torch.equal((h * 1000).round() / 1000, h) and float(h.min()) == pytest.approx(1 / 1000)
    else:
        torch.testing.assert_close(h, (t / 4).clamp_max(0.04))
    seen, forward = [], method.student.net.forward
    method.student.net.forward = lambda x, time, cond: seen.append(time) or forward(x, time, cond)
    at(method, 4000)
    for time in seen:
        assert float((time - t).abs().max()) < 0.04 + 1e-6
        assert float(time.min()) > 0 and bool((time >= (t - h - 1e-6)).all())


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_network_that_returns_x0_has_finite_losses_at_the_defaults(path):
    """Read at clean data its noise would be 0 / 0."""
    teacher = ToyTeacher(Gaussian(path, MU, S), path)
    method = SCM(
        Copies(teacher, toy_student(Perceptron(), path)), (1.0,), SCM.Options(guidance=1.0, tangent_warmup=0)
    )
    for step in range(20):
        loss = loss_of(method, "student", data(64, step))[0]
        loss.backward()
        assert bool(torch.isfinite(loss)), step
    assert all(bool(torch.isfinite(p.grad).all()) for p in method.student.net.parameters())


@pytest.mark.parametrize("timestep", [1, 4, 9, 19, 49, 199, 499])
def test_the_tangent_of_the_exact_map_vanishes_at_the_clean_end_of_a_table_too(timestep):
    """Data of deviation 0.1, on Stable Diffusion's table with the default step: what is left of the teacher's own
    tangent. With a step of 0.02 at every time it was 0.65 at timestep 4, 0.59 at 9 and 0.12 at 19."""
    path, left = table_path(), {}
    for name, net in (("map", GaussianMap), ("teacher", Gaussian)):
        teacher = ToyTeacher(Gaussian(path, MU, 0.1), path)
        options = SCM.Options(guidance=1.0, tangent_warmup=0)
        method = SCM(Copies(teacher, toy_student(net(path, MU, 0.1), path)), (1.0,), options)
        t = torch.full((256,), (timestep + 1) / 1000)
        batch = toy_batch(256, pairs=lambda z: MU + 0.1 * z)
        x_t = noised(path, batch.pairs.x0, batch.draws.normal("eps", SHAPE), t)
        now = teacher.predict(x_t, t, Condition())
        said = trig_velocity(method.student.predict(x_t, t, Condition())).detach()
        left[name] = float(method.tangent(now, said, Condition(), 1.0).square().mean().sqrt())
    print(timestep, left)
    assert left["map"] < max(0.05 * left["teacher"], 0.004)  # the normalisation's offset is 0.1


def test_without_the_derivative_it_is_velocity_matching():
    """At step 0 of a warm-up a student that starts as its teacher has no gradient; under guidance g = cos^2 (v - F)."""
    path = TrigPath()
    method = scm(path, Gaussian(path, MU, S), tangent_warmup=10, adaptive=False)
    loss_of(method, "student", data())[0].backward()
    assert abs(float(method.student.net.mean.grad)) < 1e-6
    method = scm(path, Gaussian(path, MU, S), Gaussian(path, 0.2, S), tangent_warmup=10, guidance=3.0)
    g, now, a = at(method, share=0.0)
    plain = trig_velocity(method.student.predict(now.at(now.t), now.t, Condition())).detach()
    torch.testing.assert_close(g, torch.cos(a).square() * (trig_velocity(now) - plain))


def test_the_pull_of_a_sample_is_bounded_however_large_its_tangent():
    """|F - target| = |g| / (|g| + c) < 1 in root mean squares, and the gradient in F is -2 e^w g / (|g| + c)."""
    path = TrigPath()
    method = scm(path, Perceptron(), output="velocity", adaptive=False, offset=0.1)
    small, logs = loss_of(method, "student", data())
    small = small.detach()
    with torch.no_grad():
        method.teacher.denoiser.net.mean += 100.0
    large = loss_of(method, "student", data())[0].detach()
    assert float(small) < float(large) < 1
    size = at(method)[0].flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(large, (size / (size + 0.1)).square().mean(), rtol=1e-3, atol=1e-5)
    assert 0 < float(logs["tangent"]) < float(size.max())


def test_the_learnt_weight_ends_at_the_inverse_error():
    """argmin_w of e^w E - w is -ln E at every angle (card, G11)."""
    weight, a = Weight(), torch.linspace(0, math.pi / 2, 64)
    errors = torch.exp(1 + torch.cos(4 * a) - 0.5 * torch.cos(2 * a))
    optimizer = torch.optim.LBFGS(weight.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (weight(a).exp() * errors - weight(a)).mean()
        loss.backward()
        return loss

    assert bool((weight(a) == 0).all())
    optimizer.step(closure)
    torch.testing.assert_close(weight(a).exp() * errors, torch.ones(64), atol=1e-2, rtol=0)


def test_the_learnt_weight_scales_each_error_and_pays_for_itself():
    """mean(e^w error - w), sCM's eq. 8 with the prefactor in the level's law; of a constant w: e^w mean(error) - w."""
    plain, weighted = (scm(FlowPath(), Perceptron(), adaptive=adaptive) for adaptive in (False, True))
    with torch.no_grad():
        weighted.weight.amplitudes[0] = 0.7
    error = loss_of(plain, "student", data())[0].item()
    assert loss_of(weighted, "student", data())[0].item() == pytest.approx(
        math.exp(0.7) * error - 0.7, rel=1e-5
    )


def test_the_derivative_is_whole_after_its_warm_up_and_without_one():
    """At the exact map the whole tangent is 0, and no other share of it; the log states its root mean square."""
    for tangent_warmup, step, whole in [(0, 0, True), (10, 5, False), (10, 10, True), (10, 15, True)]:
        method = scm(FlowPath(), GaussianMap(FlowPath(), MU, S), tangent_warmup=tangent_warmup)
        _, logs = loss_of(method, "student", data(step=step))
        assert (float(logs["tangent"]) < 1e-4) == whole
        assert not any(value.requires_grad for value in logs.values())
    method = scm(FlowPath(), Perceptron())
    tangent = loss_of(method, "student", data())[1]["tangent"]
    torch.testing.assert_close(tangent, at(method)[0].square().mean().sqrt())


def test_times_of_a_table_are_its_entries_and_the_share_at_noise_is_what_was_asked():
    method = scm(table_path(), Perceptron(), noise_share=0.3)
    t = method.drawn_times(data(2000).draws)
    assert torch.equal((t * 1000).round() / 1000, t)
    assert float(t.min()) == pytest.approx(2 / 1000) and float(t.max()) == 1
    assert float((t == 1).float().mean()) == pytest.approx(0.3 + 0.7 * 0.015, abs=0.04)
    level = torch.tan(scm(TrigPath(), Perceptron()).drawn_times(data(2000).draws) * math.pi / 2).log()
    assert float(level.mean()) == pytest.approx(-0.8, abs=0.12)
    assert float(level.std()) == pytest.approx(1.6, abs=0.1)


def test_a_student_of_a_table_is_drawn_by_lcm_scheduler_from_the_same_weights(teacher_of):
    """An eps teacher with guidance: two updates, then a stock pipeline draws what the trainer draws."""
    from tiny import tiny_prompts

    from stepdistill.export.student_folder import student_pipeline
    from stepdistill.losses.batch import Examples
    from stepdistill.networks.pictures import draw_as_pipeline
    from stepdistill.networks.student import Student

    teacher = teacher_of("sd")
    student = Student.from_teacher(teacher)
    method = SCM(
        Copies(teacher, student), (1.0, 0.5), SCM.Options(guidance=2.5, tangent_warmup=1, noise_share=0.5)
    )
    optimizer = torch.optim.Adam([p for net in modules_of(method).values() for p in net.parameters()], 1e-3)
    prompts = tiny_prompts("sd", 4)
    for step in (1, 2):
        plain = toy_batch(4, step)
        x0 = plain.draws.normal("x0", teacher.codec.shape)
        cond = teacher.codec.encode(prompts)
        loss, logs = loss_of(method, "student", replace(plain, cond=cond, pairs=Examples(x0, cond)))
        assert bool(torch.isfinite(loss)) and 0 < float(logs["error"]) < 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert method.derivative.way == "difference"  # what a table has by default
    sampler = on_stock_grid(method.sampler(), student.path, teacher.pipe.scheduler)
    pipe = student_pipeline(student, sampler, teacher)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipe(
        prompts[:2], num_inference_steps=2, guidance_scale=0.0, generator=generators, output_type="pt"
    )
    ours = draw_as_pipeline(student, sampler, teacher.codec, prompts[:2], (0, 1))
    assert float((drawn.images - ours).abs().max()) < 1e-2 and float(ours.std()) > 0.01


class Velocity(nn.Module):
    """The Gaussian's exact velocity on the trigonometric path, and a perceptron's correction, zero at the start."""

    def __init__(self):
        super().__init__()
        self.exact, self.correction = Gaussian(TrigPath(), MU, S).requires_grad_(False), Perceptron()
        nn.init.zeros_(self.correction.last.weight)
        nn.init.zeros_(self.correction.last.bias)

    def forward(self, x, t, cond):
        a = per_sample(TrigPath().angle(t), x)
        return (torch.cos(a) * x - self.exact(x, t, cond)) / torch.sin(a) + self.correction(x, t, cond)


def test_one_step_moves_from_the_teachers_mean_towards_the_trajectorys_end():
    path = TrigPath()
    student = toy_student(Velocity(), path, "v")
    options = SCM.Options(
        guidance=1.0,
        log_mean=0.0,
        log_deviation=1.4,
        tangent_warmup=50,
        adaptive=False,
        derivative="difference",
    )
    method = SCM(Copies(ToyTeacher(Velocity(), path, "v"), student), (1.0,), options)
    z = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def error():
        drawn = student.predict(z, torch.ones(500), Condition()).x0
        return float((drawn - (MU + S * z)).square().mean().sqrt())

    optimizer = torch.optim.Adam(student.net.correction.parameters(), 1e-3, betas=(0.9, 0.99))
    start, steps = error(), 320
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(method, "student", data(48, step))[0].backward()
        optimizer.step()
    print(f"before {start}, after {error()}")
    assert error() < 0.5 * start
