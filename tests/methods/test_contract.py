"""Every file of methods/ keeps the contract of Method, without being told about the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stepdistill
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.methods import find_method
from stepdistill.system.shipped import method_names
from stepdistill.testing import BrokenContract, check_method
from stepdistill.testing.contract import (
    batch_for,
    build,
    check_halves,
    check_losses,
    check_options,
    check_randomness,
    check_sampler,
)

PACKAGE = Path(stepdistill.__file__).parent


STEPS = {"mdt_dist": (1.0,)}
"""The times of a method that takes one alone; the others are tried in two steps."""

BELOW = [name for name in method_names() if find_method(name).starts_below]


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *((name, times) for name in method_names() for times in (None, STEPS.get(name, (1.0, 0.5)))),
        *((name, times) for name in BELOW for times in ((0.4,), (0.6, 0.3))),
    ],
)
def test_losses_are_finite_and_reach_only_the_network_whose_turn_it_is(name, times):
    check_losses(name, times)


def test_the_watch_holds_no_student_to_its_teacher_that_is_led_elsewhere():
    """By a reward, new images or captions, a word: where the options say so."""
    led = {name for name in method_names() if build(name).leaves_teacher}
    assert led == {"crd", "echo", "gndmr", "internalise", "self_opd", "uni_dad"}
    images = build("self_opd")
    images.options = images.Options(source="images")
    assert images.leaves_teacher
    for name in ("gndm", "gndmr"):
        made = build(name)
        for weight in (0.0, 0.5):
            made.options = made.Options(climb_weight=weight)
            assert made.leaves_teacher == bool(weight)


def test_what_makes_no_call_of_a_drawing_follows_the_student():
    """Terms and averages are not for it. Two learn data, so that nobody expects them to know the student's samples, and
    of one features are all that is read."""
    flags = {(name, key): one for name in method_names() for key, one in build(name).trained().items()}
    for (_, key), one in flags.items():
        assert one.follows == (key != "student" and not key.startswith("expert"))
    of_data = {place for place, one in flags.items() if one.of_data}
    assert of_data == {("uni_dad", "target"), ("echo", "learner")}
    assert [place for place, one in flags.items() if one.features_only] == [("lightning", "discriminator")]


def test_methods_that_match_distributions_start_below_pure_noise():
    """The noise itself is the network's input: net(z, t) is what is matched, what is drawn, and what a warm start
    regresses on."""
    assert BELOW == [
        "asd",
        "diff_instruct",
        "disback",
        "dmd",
        "f_distill",
        "gdd",
        "gndm",
        "sid",
        "sim",
        "uni_dad",
        "vdot",
    ]
    for name in BELOW:
        method = build(name, (0.4,))
        batch = batch_for(method)
        t = torch.full((8,), 0.4)
        seen = method.student.predict(batch.noise, t, batch.cond).x0
        assert torch.equal(method.generate(batch), seen)
        assert torch.equal(method.sampler().draw(method.student, batch.noise, batch.cond, batch.fresh), seen)
        of_pairs = method.student.predict(batch.pairs.noise, t, batch.pairs.cond).x0
        assert torch.equal(method.regression(batch), (of_pairs - batch.pairs.x0).square().mean())


@pytest.mark.parametrize("name", method_names())
def test_the_same_seed_gives_the_same_loss_and_another_step_another(name):
    check_randomness(name)


@pytest.mark.parametrize("name", method_names())
def test_a_batch_is_the_mean_of_its_halves_in_loss_and_gradient(name):
    check_halves(name)


@pytest.mark.parametrize("name", method_names())
def test_options_and_needs_are_declared(name):
    check_options(name)
    kind = find_method(name)
    assert kind.default_times == uniform_times(len(kind.default_times))


@pytest.mark.parametrize("name", method_names())
def test_the_sampler_draws_with_the_methods_own_student(name):
    check_sampler(name, STEPS.get(name, (1.0, 0.5)))


OWN = """import torch
from stepdistill import extend as sd


class Own(sd.Method):
    class Options(sd.MethodOptions):
        pass

    def sampler(self):
        return sd.Sampler(self.times, renoise=False)

    def loss(self, turn, batch):
        t = batch.draws.uniform("t")
        x = batch.draws.normal("x", batch.shape)
        target = self.teacher.predict(x, t, batch.cond).x0
        error = (self.student.predict(x, t, batch.cond).x0 - target).square()
        return sd.Loss(error.mean(), {"error": error.mean()})
"""


@pytest.mark.parametrize(
    ("line", "broken", "says"),
    [
        ("", "", None),
        ('batch.draws.uniform("t")', "torch.rand(batch.draws.count)", "draw from batch.draws alone"),
        ("error.mean(), {", "error.sum(), {", "not the mean of those of the batch's halves"),
        ("error.mean(), {", "error, {", r"the loss of student has the shape \(8, 2, 1, 1\)"),
        ("error.mean(), {", "0 * error.mean(), {", "leaves 8 of its own weights alone"),
        (
            '{"error": error.mean()}',
            '{"error": error.mean().log() * 0 / 0}',
            "logs error, which is no finite",
        ),
        ("self.times, renoise", "(1.0,), renoise", None),
        (
            "class Options(sd.MethodOptions):\n        pass",
            "class Options(sd.MethodOptions):\n        model_config = {'extra': 'allow'}",
            "keys that they do not know",
        ),
        (
            "def sampler",
            "def turn(self, step):\n        return sd.Turn('other', step)\n\n    def sampler",
            "trained\\(\\) names student, and turn",
        ),
    ],
)
def test_a_method_of_ones_own_is_told_what_it_breaks(line, broken, says, tmp_path):
    file = tmp_path / "own.py"
    assert line in OWN
    file.write_text(OWN.replace(line, broken) if line else OWN)
    if says is None:
        check_method(file)
        return
    with pytest.raises(BrokenContract, match=says):
        check_method(file)


def test_a_method_from_a_file_is_found(tmp_path):
    """A subclass of Method in a file of one's own, given by its path."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from stepdistill.methods.lcm import LCM\n\n\nclass Mine(LCM):\n    default_times = (1.0, 0.5)\n"
    )
    assert find_method(str(file)).default_times == (1.0, 0.5)
    assert find_method(str(file)).__name__ == "Mine"


def test_no_method_reads_its_clock_from_the_random_numbers():
    """``turn.step`` is the method's own; the step of the draws is that of the run, with the terms' turns in between."""
    read = [file for folder in ("methods", "losses") for file in (PACKAGE / folder).glob("*.py")]
    assert len(read) > 30 and not [file.name for file in read if "draws.step" in file.read_text("utf-8")]
