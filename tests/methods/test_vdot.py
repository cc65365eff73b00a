"""VDOT between fields made by hand: where transport is DMD's field, and where it is not."""

from __future__ import annotations

import pytest
import torch

from stepdistill.diffusion.path import FlowPath, Prediction
from stepdistill.losses.fake_score import Views
from stepdistill.methods.dmd import DMD
from stepdistill.methods.vdot import VDOT
from stepdistill.networks.roles import Copies
from stepdistill.testing.toys import Gaussian, Perceptron, ToyTeacher, loss_of, toy_batch, toy_student

PATH = FlowPath()


def method_of(kind=VDOT, **options):
    teacher = ToyTeacher(Gaussian(PATH, 0.7, 0.8), PATH)
    method = kind(Copies(teacher, toy_student(Perceptron(seed=1), PATH)), (1.0,), kind.Options(**options))
    method.fake.net = Gaussian(PATH, 0.1, 1.2)
    return method


def seen(shape=(2, 3, 4, 4), shift=None, order=None):
    """Views in which the real tokens are the fake ones, moved or in another order."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=generator)
    b = torch.randn(shape, generator=generator) if shift is None else a + shift
    b = b if order is None else b.flatten(2)[:, :, order].view(shape)
    t = torch.full((shape[0],), 0.5)
    return Views(a, a, t, Prediction(PATH, b, b, t), Prediction(PATH, a, a, t))


@pytest.mark.parametrize("entropy", [0.05, 5.0])
def test_equal_predictions_have_no_field_whatever_the_entropy(entropy):
    """What entropy adds draws towards the mean of the tokens, and is taken away."""
    views = seen(shift=0.0)
    assert float(method_of(entropy=entropy).transport(views).abs().max()) == 0.0
    drawn = method_of(entropy=entropy, debiased=False).transport(views)
    if entropy > 1:
        x = views.x - views.x.mean(dim=(2, 3), keepdim=True)
        assert float((drawn * x).sum() / x.square().sum()) > 0.5


def test_tokens_that_may_not_move_have_dmds_field():
    views = seen()
    field = method_of(layout=1e4, debiased=False).transport(views)
    torch.testing.assert_close(field, views.error, rtol=0, atol=1e-4)


def test_one_token_is_dmds_field():
    """A picture of one place: the plan has no choice, and VDOT is DMD with both weights."""
    batch = toy_batch(32)
    vdot, dmd = method_of(transport_weight=0.5), method_of(DMD, guidance=1.0)
    ours, theirs = (
        torch.autograd.grad(loss_of(m, "student", batch)[0], [*m.student.net.parameters()])
        for m in (vdot, dmd)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, 1.5 * other)


def test_without_transport_it_is_dmd():
    batch = toy_batch(32)
    vdot, dmd = method_of(transport_weight=0.0), method_of(DMD, guidance=1.0)
    assert torch.equal(loss_of(vdot, "student", batch)[0], loss_of(dmd, "student", batch)[0])


def test_the_order_of_the_real_tokens_counts_only_with_a_layout():
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    straight, mixed = seen(shift=0.3), seen(shift=0.3, order=order)
    free, tied = method_of(entropy=0.01, iterations=400), method_of(layout=1.0, iterations=400)
    torch.testing.assert_close(free.transport_cost(mixed), free.transport_cost(straight), rtol=1e-3, atol=0)
    assert bool((tied.transport_cost(mixed) > 1.5 * tied.transport_cost(straight)).all())


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 2, 2, 3)])
def test_the_cost_has_the_field_as_its_gradient(debiased, shape):
    """In x0_fake; in x0_real it has one of its own, through which the networks' inputs are reached."""
    method, views = method_of(debiased=debiased, iterations=600), seen(shape)
    fake, real = views.fake.x0.requires_grad_(True), views.real.x0.requires_grad_(True)
    by_fake, by_real = torch.autograd.grad(method.transport_cost(views).sum(), (fake, real))
    torch.testing.assert_close(by_fake, method.transport(views), rtol=0, atol=1e-4)
    assert float(by_real.abs().max()) > 0.1


def test_the_gradient_through_the_networks_is_the_chain_rule():
    """One token: the cost is |x0_fake - x0_real|^2 / 2 over numbers and mean|x - x0_real|, in x by autograd."""
    method, batch = method_of(through_networks=True, matching_weight=0.0), toy_batch(16)
    parameters = [*method.student.net.parameters()]
    found = torch.autograd.grad(loss_of(method, "student", batch)[0], parameters)
    views = method.views(method.generate(batch), batch)
    error = (views.fake.x0 - views.real.x0).square().flatten(1).mean(1) / (
        views.distance.detach().flatten() + 1e-6
    )
    for one, other in zip(found, torch.autograd.grad(0.5 * error.mean(), parameters), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("debiased", "cost"), [(True, 0.0), (False, None)])
def test_the_cost_is_a_divergence_without_what_entropy_adds(debiased, cost):
    """Zero between equal clouds: of each cloud's cost to itself a half is taken away, of both."""
    views, method = seen(shift=0.0), method_of(debiased=debiased, entropy=1.0)
    found = method.transport_cost(views)
    assert [len(method.plans(views, of_real=real)) for real in (False, True)] == (
        [2, 3] if debiased else [1, 1]
    )
    if cost is None:
        assert bool((found > 0.1).all())
    else:
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-4)
    apart = method_of(debiased=True, entropy=1.0).transport_cost(seen())
    assert bool((apart > 0.1).all())


def test_clouds_of_one_point_have_no_field_and_plans_are_whole_where_a_run_computes_in_half():
    one = torch.ones(2, 3, 4, 4)
    t = torch.full((2,), 0.5)
    views = Views(one, one, t, Prediction(PATH, one, one, t), Prediction(PATH, one, one, t))
    assert float(method_of().transport(views).abs().max()) == 0.0
    method, x = method_of(), seen().x.requires_grad_()
    method.views = lambda x, batch: seen()
    whole = torch.autograd.grad(method.match(x, toy_batch(2))[0], x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.autograd.grad(method.match(x, toy_batch(2))[0], x)[0]
    assert torch.equal(half, whole)


def test_what_is_logged_of_the_cost_holds_no_graph():
    method = method_of(through_networks=True)
    loss, logs = loss_of(method, "student", toy_batch(8))
    assert loss.requires_grad and not any(value.requires_grad for value in logs.values())
