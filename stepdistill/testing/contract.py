"""The contract of a method, checked between two perceptrons, with a batch that has everything a method can need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import NEEDS, Method, MethodOptions
from stepdistill.losses.looks import Eye, Looks
from stepdistill.losses.rewards import Rewards
from stepdistill.methods import find_method
from stepdistill.networks.concept import Concept
from stepdistill.networks.roles import Copies, Roles
from stepdistill.testing.toys import (
    SHAPE,
    Mixture,
    Perceptron,
    ToyTeacher,
    clear,
    loss_of,
    modules_of,
    toy_batch,
    toy_student,
    weights_of,
)
from stepdistill.training.parallel import take_turn

PATH = FlowPath()
STEPS = 200
"""The method's own steps among which every network must have a turn."""


class BrokenContract(AssertionError):
    """A method does not keep its contract; the message says which part."""


def nearness(images: Tensor, prompt: Tensor) -> Tensor:
    """A reward: how near each is to 1, [B]."""
    return -(images - 1).square().flatten(1).mean(1)


def equipped(kind: type[Method], roles: Roles, times: tuple[float, ...], options: MethodOptions) -> Method:
    """A method with all that it asks a run for beside data: a reward that likes samples near a point, a word whose one
    row moves the states that toys are called with, and a network that sees a sample's two numbers as they are."""
    looks, needs = None, options.needs
    if "concept" in needs:
        row = nn.Parameter(torch.full((2,), 0.1))
        roles.concept = Concept([row], "ab", lambda texts: Condition({"moved": row.expand(len(texts), 2)}))
    if "looks" in needs:
        own = Eye(lambda pictures: pictures.mean((2, 3)), 2)
        looks = Looks(lambda x0: x0.view(-1, 2, 1, 1).expand(-1, 2, 4, 4), {"own": own})
    method = kind(roles, times, options, looks)
    if "reward" in needs:
        method.rewards = Rewards(lambda x0: x0, (nearness,))
    return method


def build(name: str, times: tuple[float, ...] | None = None) -> Method:
    """A method with its default options, between a perceptron that teaches and one that learns.

    Args:
        name: of a shipped method, or a path.
        times: of the student; None takes the method's.

    Raises:
        UserError: there is no such method.
    """
    kind = find_method(name)
    teacher = ToyTeacher(Perceptron(seed=0), PATH, "velocity")
    student = toy_student(Perceptron(seed=1), PATH, "velocity")
    method = equipped(kind, Copies(teacher, student), times or kind.default_times, kind.Options())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # off the start, where a copy of the teacher may make a loss exactly zero
        for parameter in weights_of(method):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return method


def batch_for(method: Method, count: int = 8, step: int = 0) -> Batch:
    """A batch of ``count`` samples with images, pairs and states, in groups where they are asked for, for a method's
    step."""
    mixture = Mixture(PATH)
    images = mixture.sample(count, torch.Generator().manual_seed(7))
    batch = toy_batch(count, step, pairs=lambda z: 0.3 * z + 0.1, images=images)
    drawn = cast(Examples, batch.pairs)
    noise = cast(Tensor, drawn.noise)
    between = [t * noise + (1 - t) * drawn.x0 for t in method.pair_times()]
    states = torch.stack(between, 1) if between else None
    group = 2 if "group" in method.options.needs else 1
    return replace(batch, pairs=Examples(drawn.x0, drawn.cond, noise, states), group=group)


def turns_of(method: Method) -> dict[str, int]:
    """The first step at which each network has its turn."""
    return {method.turn(step).network: step for step in reversed(range(STEPS))}


def check_options(name: str) -> None:
    """Options have defaults, are frozen and closed, and what is needed is known; times descend from 1.

    Raises:
        BrokenContract: naming what is not so.
    """
    kind = find_method(name)
    options = kind.Options()
    _must(
        bool(options.model_config.get("frozen")), "its Options are not frozen: derive them from MethodOptions"
    )
    _must(options.model_config.get("extra") == "forbid", "its Options take keys that they do not know")
    odd = options.needs - set(NEEDS)
    _must(not odd, f"it needs {', '.join(sorted(odd))}; there are {', '.join(NEEDS)}")
    times = kind.default_times
    descends = list(times) == sorted(set(times), reverse=True) and times[0] == 1.0 and times[-1] > 0
    _must(descends, f"its default_times are {times}: they must descend from 1 and stay above 0")


def check_losses(name: str, times: tuple[float, ...] | None = None) -> None:
    """Every network has a turn; losses and logs are finite scalars; the gradient of a turn reaches all weights of its
    network, and none of another's or the teacher's.

    Raises:
        BrokenContract: naming the network.
    """
    method = build(name, times)
    trained = {key: list(net.parameters()) for key, net in modules_of(method).items()}
    turns = turns_of(method)
    _must(
        set(turns) == set(trained),
        f"trained() names {', '.join(trained)}, and turn() in {STEPS} steps {', '.join(turns)}",
    )
    for turn, step in turns.items():
        clear(method)
        take_turn(trained, turn)
        loss, logs = loss_of(method, turn, batch_for(method, step=step))
        _must(
            loss.ndim == 0,
            f"the loss of {turn} has the shape {tuple(loss.shape)}: give the mean over samples",
        )
        _must(bool(torch.isfinite(loss)), f"the loss of {turn} is {float(loss.detach())}")
        lost = [key for key, value in logs.items() if value.numel() != 1 or not bool(torch.isfinite(value))]
        _must(not lost, f"{turn} logs {', '.join(lost)}, which is no finite scalar")
        loss.backward()
        for other, parameters in trained.items():
            reached = [p.grad is not None and bool(p.grad.any()) for p in parameters]
            if other == turn:
                one = method.trained()[turn]
                of_role = len(method.roles.parameters(one.role)) if one.role and one.features_only else 0
                if any(reached[:of_role]):  # what lies before its features
                    reached = reached[of_role:]
                _must(
                    all(reached), f"the loss of {turn} leaves {reached.count(False)} of its own weights alone"
                )
            else:
                _must(not any(reached), f"the loss of {turn} has a gradient for {other}: detach it")
    taught = [p.grad for p in method.teacher.denoiser.net.parameters()]
    _must(all(grad is None for grad in taught), "a loss has a gradient for the teacher's weights")


def check_randomness(name: str) -> None:
    """The same seed and step give the same loss to the last bit, another step another: all random numbers are drawn
    from the batch.

    Raises:
        BrokenContract: they are not.
    """
    first, second = build(name), build(name)
    for turn, step in turns_of(first).items():
        one, again = (loss_of(each, turn, batch_for(each, step=step))[0] for each in (first, second))
        _must(
            torch.equal(one, again),
            f"the loss of {turn} differs with the same seed: draw from batch.draws alone",
        )
        other = loss_of(first, turn, batch_for(first, step=step + 1000))[0]
        _must(
            not torch.equal(one, other),
            f"the loss of {turn} is the same at another step: draw from batch.draws",
        )


def check_halves(name: str) -> None:
    """Loss and gradient of a batch are the means of those of its halves, so that processes and accumulation change
    nothing.

    Raises:
        BrokenContract: they are not, beyond rounding.
    """
    method = build(name)
    for turn, step in turns_of(method).items():
        parameters = list(modules_of(method)[turn].parameters())
        batch = batch_for(method, step=step)
        whole = _gradients(loss_of(method, turn, batch)[0], parameters)
        halves = [_gradients(loss_of(method, turn, part)[0], parameters) for part in batch.split(2)]
        for all_of_it, one, two in zip(whole, *halves, strict=True):
            same = torch.allclose(all_of_it, (one + two) / 2, rtol=1e-4, atol=1e-6)
            _must(same, f"the gradient of {turn} is not the mean of those of the batch's halves")


def check_sampler(name: str, times: tuple[float, ...] | None = None) -> None:
    """The method's sampler draws finite samples with its student.

    Raises:
        BrokenContract: it does not.
    """
    method = build(name, times)
    batch = batch_for(method)
    drawn = method.sampler().draw(method.student, batch.noise, batch.cond, batch.fresh)
    _must(drawn.shape == (8, *SHAPE), f"its sampler draws {tuple(drawn.shape)} of noise of {(8, *SHAPE)}")
    _must(bool(torch.isfinite(drawn).all()), "its sampler draws numbers that are not finite")


def check_method(method: str | Path) -> None:
    """All of these checks, of a method between perceptrons: seconds on one core. For a test of your own:

        def test_my_method_keeps_the_contract():
            stepdistill.testing.check_method("./my_method.py")

    It says that a method fits into a run, and not that it is right: for that, try it where you know the answer, with
    the closed forms of ``stepdistill.testing.toys``.

    Args:
        method: the path of a file, or a shipped method's name.

    Raises:
        UserError: there is no such method, or the file does not define one.
        BrokenContract: naming the first part of the contract that is not kept.
    """
    name = str(method)
    check_options(name)
    check_losses(name)
    check_randomness(name)
    check_halves(name)
    check_sampler(name)


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """Those of the parameters, 0 where the loss does not read one."""
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def _must(kept: bool, otherwise: str) -> None:
    if not kept:
        raise BrokenContract(otherwise)
