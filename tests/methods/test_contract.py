"""Every file of methods/ keeps the contract of Method, without being told about the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract_toy import batch_for, build
from toy import SHAPE, clear, loss_of, modules_of

import stepdistill
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.losses.contract import NEEDS
from stepdistill.methods import find_method, method_names
from stepdistill.training.parallel import take_turn

PACKAGE = Path(stepdistill.__file__).parent


def turns_of(method):
    return {method.turn(step).network: step for step in reversed(range(200))}


BELOW = [name for name in method_names() if find_method(name).starts_below]


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *((name, times) for name in method_names() for times in (None, (1.0, 0.5))),
        *((name, times) for name in BELOW for times in ((0.4,), (0.6, 0.3))),
    ],
)
def test_losses_are_finite_and_reach_only_the_network_whose_turn_it_is(name, times):
    method = build(name, times)
    networks = modules_of(method)
    assert set(turns_of(method)) == set(networks)
    trained = {key: list(net.parameters()) for key, net in networks.items()}
    for turn, step in turns_of(method).items():
        clear(method)
        take_turn(trained, turn)
        loss, logs = loss_of(method, turn, batch_for(method, step=step))
        loss.backward()
        assert loss.ndim == 0 and bool(torch.isfinite(loss))
        assert all(bool(torch.isfinite(value)) for value in logs.values())
        for other, parameters in trained.items():
            reached = [p.grad is not None and bool(p.grad.any()) for p in parameters]
            assert all(reached) if other == turn else not any(reached), (turn, other, reached)
    assert all(p.grad is None for p in method.teacher.denoiser.net.parameters())


def test_methods_that_match_distributions_start_below_pure_noise():
    """The noise itself is the network's input: net(z, t) is what is matched, what is drawn, and what a warm start
    regresses on."""
    assert BELOW == ["diff_instruct", "dmd", "f_distill", "sid", "sim"]
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
    first, second = build(name), build(name)
    for turn, step in turns_of(first).items():
        one = loss_of(first, turn, batch_for(first, step=step))[0]
        assert torch.equal(one, loss_of(second, turn, batch_for(second, step=step))[0])
        assert not torch.equal(one, loss_of(first, turn, batch_for(first, step=step + 1000))[0])


@pytest.mark.parametrize("name", method_names())
def test_a_batch_is_the_mean_of_its_halves_in_loss_and_gradient(name):
    method = build(name)
    for turn, step in turns_of(method).items():
        parameters = list(modules_of(method)[turn].parameters())
        batch = batch_for(method, step=step)
        whole = torch.autograd.grad(loss_of(method, turn, batch)[0], parameters)
        halves = [torch.autograd.grad(loss_of(method, turn, part)[0], parameters) for part in batch.split(2)]
        for all_of_it, one, two in zip(whole, *halves, strict=True):
            torch.testing.assert_close(all_of_it, (one + two) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", method_names())
def test_options_and_needs_are_declared(name):
    kind = find_method(name)
    options = kind.Options()
    assert options.model_config["frozen"] and options.model_config["extra"] == "forbid"
    assert options.needs <= set(NEEDS)
    assert kind.default_times[0] == 1.0
    assert kind.default_times == uniform_times(len(kind.default_times))


@pytest.mark.parametrize("name", method_names())
def test_the_sampler_draws_with_the_methods_own_student(name):
    method = build(name, (1.0, 0.5))
    batch = batch_for(method)
    drawn = method.sampler().draw(method.student, batch.noise, batch.cond, batch.fresh)
    assert drawn.shape == (8, *SHAPE)
    assert bool(torch.isfinite(drawn).all())


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
