"""SDXL-Lightning: whose a jump is, with its start and without, and parts of stages that follow one another."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_prompts, tiny_teacher

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Turn
from stepdistill.losses.gan import discriminator_loss
from stepdistill.losses.progressive import Jump
from stepdistill.methods.lightning import Lightning
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.testing.toys import Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student
from stepdistill.training.parallel import take_turn

PATH = FlowPath()
COUNT = 64
REGRESSION, TRAJECTORY, RELAXED = (
    {"trajectory_updates": 1, "relaxed_updates": 0, "regression_updates": (100,)},
    {"relaxed_updates": 0},
    {"trajectory_updates": 0},
)


def method_of(teacher=None, student=None, times=(1.0, 0.5), path=PATH, **options):
    """Between perceptrons, or others; only perceptrons have features."""
    made = ToyTeacher(teacher or Perceptron(seed=0), path)
    own = toy_student(student or Perceptron(seed=1), path)
    return Lightning(Copies(made, own), times, Lightning.Options(**{"ratios": (2,), **options}))


def batch_of(count=COUNT, step=0):
    return toy_batch(count, step, pairs=lambda z: 0.7 + 0.6 * z)


def at_chance(method):
    """The method with a discriminator that says 0 of everything."""
    last = method.gan.head.body[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    return method


def leaning(method, jump, real, made, *, of_start):
    """Where a discriminator at chance begins to lean: the gradient of its last weights."""
    weight = at_chance(method).gan.head.body[-1].weight
    logits = method.gan.logits(jump, [real, made], batch_of(len(real)), of_start=of_start)
    return torch.autograd.grad(discriminator_loss(*logits), weight)[0]


@pytest.mark.parametrize("options", [TRAJECTORY, RELAXED], ids=["trajectory", "relaxed"])
def test_a_discriminator_at_chance_costs_ln_2_for_each_jump_it_sees(options):
    method = at_chance(method_of(**options))
    critic, student = (loss_of(method, Turn(name, 0), batch_of())[0] for name in ("discriminator", "student"))
    torch.testing.assert_close(critic, torch.tensor(2 * math.log(2)))
    torch.testing.assert_close(student, torch.tensor(math.log(2)))


@pytest.mark.parametrize("options", [TRAJECTORY, RELAXED], ids=["trajectory", "relaxed"])
@pytest.mark.parametrize("path", [FlowPath(shift=3.0), TrigPath()], ids=["flow", "trig"])
def test_chance_is_the_best_there_is_only_against_the_teachers_own_jumps(options, path):
    """A teacher that knows one point alone steps along straight lines: its own network makes its jumps in one step."""

    class Point(Perceptron):
        def __init__(self, at):
            super().__init__(seed=0)
            self.at = at

        def forward(self, x, t, cond):
            return self.at + 0 * super().forward(x, t, cond)

    slopes = []
    for at in (0.7, 0.5):
        method = at_chance(method_of(Point(0.7), Point(at), path=path, **options))
        weight = method.gan.head.body[-1].weight
        loss = loss_of(method, Turn("discriminator", 0), batch_of())[0]
        slopes.append(float(torch.autograd.grad(loss, weight)[0].norm()))
    assert slopes[0] < 1e-5 < 1e-2 < slopes[1]


def test_only_with_the_start_is_a_jump_to_somebody_elses_end_told_from_the_teachers():
    """x -> -x leaves a centred Gaussian as it is: a student whose ends are the teacher's with the other sign has the
    right ends, and the wrong jumps."""
    gaussian, method = Gaussian(PATH, 0.0, 0.6), method_of()
    x = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    start, one = torch.cat([x, -x]), torch.ones(2 * COUNT)
    jump = Jump(start, (one, 0.75 * one, 0.5 * one), Condition())
    method.roles.teacher.denoiser.net = gaussian
    real = method.taught(jump, 0)
    assert torch.allclose(real[:COUNT], -real[COUNT:])
    relaxed = leaning(method, jump, real, -real, of_start=False)
    trajectory = leaning(method, jump, real, -real, of_start=True)
    assert float(relaxed.norm()) < 1e-6 < 1e-3 < float(trajectory.norm())


def test_the_relaxed_discriminator_is_given_no_start():
    method, batch = method_of(), batch_of()
    jump = method.jump(batch, 0)
    other = Jump(jump.start.flip(0) + 1, jump.times, jump.cond)
    end = [method.taught(jump, 0)]
    for of_start in (True, False):
        told, again = (method.gan.logits(one, end, batch, of_start=of_start)[0] for one in (jump, other))
        assert torch.equal(told, again) is not of_start
    without = method.gan.logits(jump, end, batch, of_start=False)[0]
    assert not torch.equal(without, method.gan.logits(jump, [end[0] + 1], batch, of_start=False)[0])


def test_its_turn_has_no_graph_to_the_student_and_says_how_far_both_kinds_are_told_apart():
    method, batch = method_of(**TRAJECTORY), batch_of()
    loss, logs = loss_of(method, Turn("discriminator", 0), batch)
    jump = method.jump(batch, 0)
    ends = [method.taught(jump, 0), method.student.predict(jump.start, jump.t, jump.cond).at(jump.s)]
    real, made = method.gan.logits(jump, ends, batch, of_start=True)
    torch.testing.assert_close(logs["told_apart"], (real - made).mean())
    weights = list(method.student.net.parameters())
    assert not any(g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True))


def test_what_a_part_shows_the_discriminator():
    """The start in the trajectory's part alone, in turns of both."""
    for options, sees in ((TRAJECTORY, 3), (RELAXED, 2)):
        method, batch = method_of(**options), batch_of()
        calls = []
        method.gan.eye.features = lambda x, t, cond, calls=calls: (
            calls.append(t) or torch.zeros(len(x), 32, 1, 1)
        )
        loss_of(method, Turn("discriminator", 0), batch)
        assert len(calls) == sees
        calls.clear()
        loss_of(method, Turn("student", 1), batch)
        assert len(calls) == sees - 1


def test_clean_ends_alone_are_noised_and_both_kinds_alike():
    path = FlowPath(shift=3.0)
    method, batch = method_of(path=path, noise_times=(0.2, 0.6), noise_shares=(3.0, 1.0)), batch_of(4096)
    jump = method.jump(batch, 0)
    clean = jump.s == 0
    assert 0.4 < float(clean.float().mean()) < 0.6
    for shares, first in (((3.0, 1.0), 0.75), ((1.0, 1.0), 0.5)):
        t = method.gan.looks_at(jump.s, batch, shares)
        assert torch.equal(t[~clean], jump.s[~clean])
        near = torch.isclose(t[clean], torch.tensor(path.shifted(0.2)))
        assert bool((near | torch.isclose(t[clean], torch.tensor(path.shifted(0.6)))).all())
        assert float(near.float().mean()) == pytest.approx(first, abs=0.03)
    seen = []
    method.gan.eye.features = lambda x, t, cond: seen.append((x, t)) or torch.zeros(len(x), 32, 1, 1)
    ends = [torch.zeros_like(jump.start), torch.ones_like(jump.start)]
    method.gan.logits(jump, ends, batch, of_start=False)
    three = method_of(path=path, noise_times=(0.2, 0.4, 0.6), noise_shares=(1.0, 1.0, 1.0))
    t = three.gan.looks_at(jump.s, batch, (1.0, 1.0, 1.0))[clean]
    for time in (0.2, 0.4, 0.6):
        near = torch.isclose(t, torch.tensor(path.shifted(time)))
        assert float(near.float().mean()) == pytest.approx(1 / 3, abs=0.03)
    (zero, t), (one, again) = seen
    alpha = path.alpha_sigma(t)[0] / path.alpha_sigma(jump.s)[0]
    assert torch.equal(t, again)
    torch.testing.assert_close(one - zero, alpha[:, None, None, None].expand_as(one))
    assert float(zero[~clean].abs().max()) == 0.0 < float(zero[clean].abs().min())
    near = t[clean] < 0.5  # 0.2, shifted: by the relaxed part's shares
    assert float(near.float().mean()) == pytest.approx(0.75, abs=0.03)
    seen.clear()
    method.gan.logits(jump, ends, batch, of_start=True)
    assert float((seen[0][1][clean] < 0.5).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(seen[2][0], jump.start) and torch.equal(seen[2][1], jump.t)


def test_regression_is_the_squared_distance_of_both_ends():
    method, batch = method_of(student=Gaussian(PATH, 0.2, 0.9), **REGRESSION), batch_of()
    jump = method.jump(batch, 0)
    x0 = method.student.predict(jump.start, jump.t, jump.cond).x0
    t, s = jump.t[:, None, None, None], jump.s[:, None, None, None]
    made = jump.start - (t - s) * (jump.start - x0) / t  # Euler's step
    expected = (made - method.taught(jump, 0)).square().mean()
    torch.testing.assert_close(loss_of(method, Turn("student", 0), batch)[0], expected)


def test_parts_and_stages_follow_one_another():
    method = method_of(
        times=(1.0,),
        ratios=(4, 2, 2),
        regression_updates=(3, 0, 2),
        trajectory_updates=2,
        relaxed_updates=1,
        adversarial_from=1,
        regression_lr_ratio=10.0,
        discriminator_lr_ratio=5.0,
    )
    assert [method.phase(step) for step in range(18)] == [
        *["4 steps, regression"] * 3,
        *["2 steps, trajectory"] * 4,
        *["2 steps, relaxed"] * 2,
        *["1 steps, regression"] * 2,
        *["1 steps, trajectory"] * 4,
        *["1 steps, relaxed"] * 3,
    ]
    assert [method.turn(step).network[0] for step in range(18)] == list("sssdsdsdsssdsdsdsd")
    assert [method.sampler_at(step).steps for step in (2, 3, 8, 9, 99)] == [4, 2, 2, 1, 1]
    assert method.lr_ratio(Turn("student", 0)) == 10.0 > method.lr_ratio(Turn("student", 2)) > 0
    assert method.lr_ratio(Turn("student", 9)) == 10.0
    assert method.lr_ratio(Turn("student", 10)) == pytest.approx(5.0)  # half of the part is done
    assert [method.lr_ratio(method.turn(step)) for step in (3, 4)] == [5.0, 1.0]
    assert method.options.group == "adversarial"


def test_the_discriminator_starts_anew_with_each_part_and_only_then():
    method = method_of(
        ratios=(2, 2), trajectory_updates=2, relaxed_updates=1, regression_updates=(0, 1), teacher_decay=0.5
    )
    start = {name: value.clone() for name, value in method.gan.head.state_dict().items()}
    teacher = method.teacher.denoiser.net.state_dict()

    def moved():
        head = all(torch.equal(value, start[name]) for name, value in method.gan.head.state_dict().items())
        net = all(
            torch.equal(v, teacher[k]) for k, v in method.roles["discriminator"].net.state_dict().items()
        )
        assert head == net
        return not head

    anew = []
    for step in range(12):
        with torch.no_grad():
            for weight in (*method.gan.parameters(), *method.roles.parameters("discriminator")):
                weight.add_(1.0)
        turn = method.turn(step)
        anew.append("discriminator" in method.anew(turn))
        method.after_step(turn)
        assert moved() != anew[-1]
    # Steps 0 to 3 and 4, 5 are the parts of the first stage, 6 the regression, 7 to 10 and then what goes on.
    assert [step for step, new in enumerate(anew) if new] == [3, 6, 10]
    assert "student" in method.anew(Turn("student", 5)) and "student" not in method.anew(Turn("student", 3))


def test_the_average_that_teaches_follows_the_student_alone():
    method = method_of(ratios=(2, 2), teacher_decay=0.5)
    target = method.average.denoiser.net
    with torch.no_grad():
        method.student.net.last.bias.fill_(3.0)
    before = target.last.bias.clone()
    method.after_step(Turn("discriminator", 0))
    assert torch.equal(target.last.bias, before)
    method.after_step(Turn("student", 1))
    torch.testing.assert_close(target.last.bias, (before + 3.0) / 2)


def test_a_stage_is_taught_by_the_student_of_the_one_before():
    """The real jumps of the second stage are those of the first one's student, blind to the first teacher."""
    method = method_of(ratios=(2, 2), trajectory_updates=1, relaxed_updates=0)
    method.after_step(method.turn(1))
    jump = method.jump(batch_of(), method.stage(2))
    state = method.student.predict(jump.start, jump.t, jump.cond).at(jump.times[1])
    end = method.student.predict(state, jump.times[1], jump.cond).at(jump.s)
    torch.testing.assert_close(method.taught(jump, 1), end)


@pytest.mark.parametrize(
    "options",
    [
        {"trajectory_updates": 0, "relaxed_updates": 0, "regression_updates": (5, 5)},
        {"trajectory_updates": 0, "relaxed_updates": 0},
        {"adversarial_from": 2, "regression_updates": (5, 5)},
        {"adversarial_from": 1},
        {"regression_updates": (1, 1, 1)},
    ],
)
def test_stages_without_what_they_need_are_refused(options):
    with pytest.raises(UserError, match=r"options.ratios has 2 stages: each needs updates"):
        method_of(ratios=(2, 2), **options)


@pytest.mark.parametrize("times", [(), (0.5,)])
def test_times_without_their_shares_are_refused(times):
    with pytest.raises(UserError, match=r"options.noise_times are . and options.noise_shares 2"):
        method_of(noise_times=times, noise_shares=(1.0, 1.0))


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("adapters", [False, True], ids=["copies", "adapters"])
def test_real_networks_are_read_as_maps_and_as_tokens(name, adapters):
    teacher = tiny_teacher(name)
    roles = Adapters(teacher, 2) if adapters else Copies(teacher)
    parts = {"ratios": (2,), "trajectory_updates": 1}
    method = Lightning(roles, (1.0,), Lightning.Options(**parts))
    with torch.no_grad():  # an adapter at its start has a gradient in one of its two matrices
        for weight in (*roles.parameters("student"), *roles.parameters("discriminator")):
            weight.add_(0.01)
    cond, draws = teacher.codec.encode(tiny_prompts(name, 2)), Draws(0, 0, 0, 2)
    clean = draws.normal("clean", teacher.codec.shape)
    batch = Batch(draws, teacher.codec.shape, cond, torch.arange(2), pairs=Examples(clean, cond, clean))
    trained = {key: one.parameters(roles) for key, one in method.trained().items()}
    for step in range(4):  # both turns of both parts
        turn = method.turn(step)
        take_turn(trained, turn.network)
        loss = loss_of(method, turn, batch)[0]
        found = torch.autograd.grad(loss, trained[turn.network], allow_unused=True)
        read = [slope is not None for slope in found]
        assert bool(torch.isfinite(loss)) and any(float(s.abs().max()) > 0 for s in found if s is not None)
        if turn.network == "student":
            assert all(read)
        else:
            inner = len(roles.parameters("discriminator"))
            assert all(read[inner:]) and any(read[:inner])
        method.after_step(turn)
        if step == 1:
            at = (clean, torch.full((2,), 0.5), cond)
            start = roles.teacher.denoiser.predict(*at).x0
            torch.testing.assert_close(roles["discriminator"].predict(*at).x0, start)
