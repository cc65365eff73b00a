"""EchoDistill: the word's gradient is the sum of both branches', what an echo lets in, when alignment is nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from matching_toy import full_batch
from torch import Tensor

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Turn
from stepdistill.losses.likeness import patch_distance, patches, sliced_wasserstein
from stepdistill.methods.echo import CYCLE, Echo
from stepdistill.networks.roles import Copies
from stepdistill.testing.contract import equipped
from stepdistill.testing.toys import SHAPE, Affine, Perceptron, ToyTeacher, toy_student
from stepdistill.training.parallel import take_turn

PATH = FlowPath()
LATE = Turn("learner", 10_000)


def made(student: Any = None, teacher: Any = None, output: Any = "velocity", **options: Any) -> Any:
    roles = Copies(
        ToyTeacher(teacher or Perceptron(seed=0), PATH, output),
        toy_student(student or Perceptron(seed=1), PATH, output),
    )
    return equipped(Echo, roles, (1.0,), Echo.Options.model_validate({"guidance": 1.0, **options}))


def batch_of(step: int = 5) -> Batch:
    batch = full_batch(step=step)
    images = batch.images
    assert images is not None
    return replace(batch, images=replace(images, number=torch.arange(len(images.x0)) % 2))


def weights(method: Any) -> dict[str, list[Any]]:
    return {name: one.parameters(method.roles) for name, one in method.trained().items()}


def value_of(method: Any, network: str, batch: Batch, step: int = 5) -> Tensor:
    found: Tensor = method.loss(Turn(network, step), batch).value
    return found


def test_the_words_gradient_is_the_sum_of_both_branches_and_what_differences_say() -> None:
    """Without an alignment, whose target moves with the word and has no gradient, differences see all of it."""
    alone = dict.fromkeys(("identity_weight", "squared_weight", "wasserstein_weight"), 0.0)
    for options in ({}, {**alone, "adversarial_weight": 1.0}):
        method, batch = made(**options), batch_of()
        take_turn(weights(method), "word")
        row = method.concept.rows[0]
        cond = method.concept.encode(batch.images.number)  # type: ignore[union-attr]
        branches = (method.taught(Turn("word", 5), batch, cond).value, method.aligned(batch, cond).value)
        both = [torch.autograd.grad(each, row, retain_graph=True)[0] for each in branches]
        (whole,) = torch.autograd.grad(value_of(method, "word", batch), row)
        assert all(float(each.abs().min()) > 1e-6 for each in both)
        torch.testing.assert_close(whole, sum(both))
    found = []
    for place in range(2):
        values = []
        for moved in (0.05, -0.05):
            with torch.no_grad():
                row[place] += moved
                values.append(float(value_of(method, "word", batch)))
                row[place] -= moved
        found.append((values[0] - values[1]) / 0.1)
    torch.testing.assert_close(whole, torch.tensor(found), rtol=0.05, atol=1e-5)


def test_in_no_other_turn_has_the_word_a_graph() -> None:
    method, batch = made(), batch_of()
    for network in ("learner", "student", "discriminator"):
        take_turn(weights(method), network)
        value_of(method, network, batch).backward()  # type: ignore[no-untyped-call]
        assert method.concept.rows[0].grad is None
        assert not method.concept.encode(torch.tensor([0, 1]))["moved"].requires_grad


def test_each_has_a_turn_in_a_cycle_and_a_rate_of_its_own() -> None:
    method = made(learner_lr_ratio=2.0, word_lr_ratio=3.0, discriminator_lr_ratio=4.0)
    assert [method.turn(step).network for step in range(5)] == [*CYCLE, CYCLE[0]]
    rates = {name: method.lr_ratio(Turn(name, 0)) for name in CYCLE}
    assert rates == {"learner": 2.0, "word": 3.0, "discriminator": 4.0, "student": 1.0}
    assert method.phase(799) == "teacher to student" and method.phase(800) == "echo"


def test_without_an_echo_the_teacher_never_sees_the_student() -> None:
    batch = batch_of()
    silent, other = made(echo_share=0.0), made(Perceptron(seed=5), echo_share=0.0)
    assert torch.equal(silent.loss(LATE, batch).value, other.loss(LATE, batch).value)
    early = Turn("learner", 3)
    assert torch.equal(made().loss(early, batch).value, made(Perceptron(seed=5)).loss(early, batch).value)
    one, two = (made(each, echo_share=1.0, echo_floor=-1.0) for each in (None, Perceptron(seed=5)))
    assert not torch.equal(one.loss(LATE, batch).value, two.loss(LATE, batch).value)


def test_an_echo_stands_in_the_place_of_images_that_it_resembles_alone() -> None:
    """The network sees a sample's two numbers: those that point where the image points are let in."""
    batch = batch_of()
    images = batch.images
    assert images is not None
    method = made(Affine(0.0, 0.0), output="x0", teacher=Affine(0.0, 0.0), echo_share=1.0, echo_floor=0.0)
    with torch.no_grad():
        method.student.net.shift += 1.0  # its sample is (1, 1), whatever the noise is
    alike = (images.x0.sum((1, 2, 3)) >= 0).float().mean()
    logs = method.loss(LATE, batch).logs
    assert 0 < float(alike) < 1 and float(logs["echoed"]) == pytest.approx(float(alike))
    cond = method.concept.encode(images.number)
    replaced = torch.where((images.x0.sum((1, 2, 3)) >= 0).view(-1, 1, 1, 1), 1.0, images.x0)
    told = replace(batch, images=replace(images, x0=replaced))
    silent = made(Affine(0.0, 0.0), output="x0", teacher=Affine(0.0, 0.0), echo_share=0.0)
    assert torch.equal(method.loss(LATE, batch).value, silent.loss(LATE, told).value)
    assert cond["moved"].shape == (len(images.x0), 2)


def test_alignment_is_nothing_where_the_student_draws_what_the_learner_says() -> None:
    method = made(Affine(0.7, 0.0), output="x0", teacher=Affine(0.7, 0.0), adversarial_weight=0.0)
    batch = batch_of()
    cond = method.concept.encode(batch.images.number)  # type: ignore[union-attr]
    assert float(method.aligned(batch, cond).value.detach()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        method.student.net.shift += 0.1
    found = {name: float(value.detach()) for name, value in method.aligned(batch, cond).logs.items()}
    assert found["squared"] == pytest.approx(
        0.01 * float((1 - batch.draws.uniform("align t")).mean()), rel=1e-3
    )


def test_the_student_is_held_to_what_it_started_as_on_other_prompts() -> None:
    method, batch = made(Affine(0.7, 0.0), output="x0", teacher=Affine(0.2, 0.5)), batch_of()
    assert float(method.away(batch).detach()) == 0.0
    with torch.no_grad():
        method.student.net.shift += 0.1
    assert float(method.away(batch).detach()) == pytest.approx(0.01, rel=1e-4)
    assert "start" not in {one.role for one in method.trained().values()}


@pytest.mark.slow
def test_a_student_told_the_word_goes_to_the_images_and_without_it_stays() -> None:
    """Images at (2, 2), where the start draws nothing."""
    method = made(squared_weight=1.0, adversarial_weight=0.2)
    with torch.no_grad():
        method.concept.rows[0].fill_(3.0)  # far enough from 0 for a perceptron to hear it
    parts, batch = weights(method), batch_of()
    optimizers = {name: torch.optim.Adam(own, lr=3e-3) for name, own in parts.items()}
    images = torch.full((16, *SHAPE), 2.0)
    examples = Examples(images, Condition(), number=torch.arange(16) % 2)

    def drawn(told: bool) -> Tensor:
        cond = method.concept.encode(examples.number) if told else Condition()
        with torch.no_grad():
            return method.drawn(replace(batch, draws=Draws(0, 9, 0, 16)), cond)

    before = {told: drawn(told) for told in (True, False)}
    for step in range(1200):
        turn = method.turn(step)
        take_turn(parts, turn.network)
        at = replace(batch_of(step), images=examples)
        optimizers[turn.network].zero_grad()
        method.loss(turn, at).value.backward()
        optimizers[turn.network].step()
    after = {told: drawn(told) for told in (True, False)}
    apart = {told: (before[told] - 2).abs().mean() for told in before}
    assert float((after[True] - 2).abs().mean()) < 0.2 * float(apart[True])
    assert float((after[False] - before[False]).abs().mean()) < 0.05 * float(apart[False])


def test_the_sliced_distance_of_what_is_moved_is_the_move_along_each_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)
    c = torch.randn(3, 1, 6, generator=generator, dtype=torch.float64)
    theta = torch.nn.functional.normalize(
        torch.randn(3, 20_000, 6, generator=generator, dtype=torch.float64), dim=2
    )
    assert float(sliced_wasserstein(a, a, theta).max()) == 0.0
    shuffled = a[:, torch.randperm(20, generator=generator)]
    torch.testing.assert_close(sliced_wasserstein(a, shuffled + c, theta), ((c * theta).sum(2) ** 2).mean(1))
    torch.testing.assert_close(
        sliced_wasserstein(a, a + c, theta), (c.square().sum(2) / 6)[:, 0], rtol=0.03, atol=0
    )


def test_patches_are_those_of_the_picture_and_its_smaller_selves() -> None:
    pictures = torch.arange(32.0).view(2, 1, 4, 4)
    assert patches(pictures).shape == (2, 4, 9)
    assert torch.equal(patches(pictures)[0, 0], torch.tensor([0.0, 1, 2, 4, 5, 6, 8, 9, 10]))
    draws = Draws(0, 0, 0, 2)
    # A flat change of c moves every patch by (c, ..., c), at every scale that has patches.
    large = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, direction = patch_distance(large, large + 0.5, draws), draws.normal("directions", (64, 27))
    along = torch.nn.functional.normalize(direction, dim=2).sum(2).square().mean(1) * 0.25
    torch.testing.assert_close(found, along)
    assert patch_distance(large, large, draws).tolist() == [0.0, 0.0]


def test_what_the_student_started_as_takes_no_gradient_and_the_learner_is_frozen_where_the_student_is() -> (
    None
):
    method, plain = made(), Copies(ToyTeacher(Perceptron(), PATH), toy_student(Perceptron(), PATH))
    assert not any(p.requires_grad for p in method.kept.net.parameters())
    plain.freeze(["first"])
    frozen = equipped(Echo, plain, (1.0,), Echo.Options.model_validate({"guidance": 1.0}))
    for name in ("student", "learner"):
        taken = {key for key, p in frozen.roles[name].net.named_parameters() if p.requires_grad}
        assert taken and not any(key.startswith("first") for key in taken)
