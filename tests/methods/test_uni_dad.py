"""Uni-DAD between two teachers: where it is DMD, where its field vanishes, and whose turn it is."""

from __future__ import annotations

import copy

import pytest
import torch

from stepdistill.diffusion.path import FlowPath
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Examples
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import Views
from stepdistill.methods.dmd import DMD
from stepdistill.methods.uni_dad import UniDAD
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

PATH = FlowPath()
PLAIN = {"adversarial_weight": 0.0}


def method_of(kind=UniDAD, teacher=None, **options):
    own = ToyTeacher(teacher or Gaussian(PATH, 0.7, 0.8), PATH)
    method = kind(Copies(own, toy_student(Perceptron(seed=1), PATH)), (1.0,), kind.Options(**options))
    if not options.get("adversarial_weight"):
        method.fake.net = Gaussian(PATH, 0.1, 1.2)
    return method


def gradient(method, batch):
    return torch.autograd.grad(loss_of(method, "student", batch)[0], [*method.student.net.parameters()])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_with_one_teacher_and_its_own_normaliser_it_is_dmd(share):
    """a = 0, or a target that is the source."""
    batch = toy_batch(32)
    ours = gradient(method_of(target_share=share, normaliser="own", **PLAIN), batch)
    theirs = gradient(method_of(DMD, guidance=1.0), batch)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_field_vanishes_at_the_mean_of_both_domains(share):
    """Equal deviations: m = (1 - a) mu_source + a mu_target, at each noise; beside it, it points there."""
    method, batch = method_of(UniDAD, Gaussian(PATH, -1.0, 0.8), target_share=share, **PLAIN), toy_batch(64)
    method.target.net = Gaussian(PATH, 2.0, 0.8)
    at = (1 - share) * -1.0 + share * 2.0
    for shift in (0.0, 0.3, -0.3):
        method.fake.net = Gaussian(PATH, at + shift, 0.8)
        x = at + shift + 0.8 * batch.noise
        with torch.no_grad():
            field = method.field(method.views(x, batch), batch)
        if shift:
            assert bool((field * shift > 0).all())  # descent goes against it
        else:
            assert float(field.abs().max()) < 1e-4


def test_the_normaliser_is_that_of_the_fake_or_of_each_teacher():
    batch = toy_batch(16)
    for normaliser in ("fake", "own"):
        method = method_of(target_share=0.4, normaliser=normaliser, **PLAIN)
        method.target.net = Gaussian(PATH, 2.0, 0.5)
        x = method.generate(batch).detach()
        views: Views = method.views(x, batch)
        other = method.target.predict(views.x_t, views.t, Condition()).x0
        first, second = views.fake.x0 - views.real.x0, views.fake.x0 - other

        def mean(a, x=x):
            return (x - a).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6

        if normaliser == "fake":
            expected = (0.6 * first + 0.4 * second) / mean(views.fake.x0)
        else:
            expected = 0.6 * first / mean(views.real.x0) + 0.4 * second / mean(other)
        torch.testing.assert_close(method.field(views, batch), expected)


def test_the_target_learns_the_images_and_only_in_its_turn():
    """Its loss is that of denoising them with their own conditions: none for a network that knows them."""
    method, images = method_of(target_share=0.5, **PLAIN), torch.full((32, 2, 1, 1), 1.5)
    batch = toy_batch(32, images=images)
    method.target.net = Gaussian(PATH, 1.5, 0.0)
    assert float(loss_of(method, "target", batch)[0].detach()) < 1e-10
    method.target.net = Gaussian(PATH, 0.5, 0.0)
    assert float(loss_of(method, "target", batch)[0].detach()) == pytest.approx(1.0)
    before = copy.deepcopy(method.target.net.state_dict())
    loss_of(method, "student", batch)[0].backward()
    assert all(p.grad is None for p in method.target.net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in method.target.net.state_dict().items())


def test_turns_rates_and_needs():
    method = method_of(
        fake_updates=2, warm_start=1, fake_warm_start=1, target_lr_ratio=3.0, fake_lr_ratio=2.0, **PLAIN
    )
    assert [method.turn(step).network[0] for step in range(10)] == list("sffftsffts")
    alone = method_of(fake_updates=2, target_share=0.0, **PLAIN)
    assert [alone.turn(step).network[0] for step in range(6)] == list("ffsffs")
    assert [method.lr_ratio(Turn(name, 5)) for name in ("target", "fake", "student")] == [3.0, 2.0, 1.0]
    assert "images" in UniDAD.Options().needs and "images" in UniDAD.Options(**PLAIN).needs
    assert "images" not in UniDAD.Options(target_share=0.0, **PLAIN).needs
    assert "target" not in alone.trained()


def test_heads_read_the_fake_network_at_its_depths():
    batch = toy_batch(16, images=torch.randn(16, 2, 1, 1))
    method = method_of(teacher=Perceptron(seed=0), adversarial_weight=0.1)
    assert method.gan.deep and method.gan.eye is method.fake
    value, logs = loss_of(method, "student", batch)
    plain = method.match(method.generate(batch), batch)[0]
    torch.testing.assert_close(value, plain + 0.1 * logs["gan"])
    assert isinstance(batch.images, Examples)


def test_the_field_that_is_logged_is_its_mean_size():
    method, batch = method_of(**PLAIN), toy_batch(16)
    x = method.generate(batch).detach()
    with torch.no_grad():
        field = method.field(method.views(x, batch), batch)
    assert float(method.match(x, batch)[1]["field"]) == pytest.approx(float(field.abs().mean()))
    assert not method_of(target_share=0.0, **PLAIN).leaves_teacher
