"""The discriminator's head and its two losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepdistill.diffusion.path import FlowPath
from stepdistill.losses.batch import Examples
from stepdistill.losses.gan import (
    Discriminator,
    FeatureGan,
    Heads,
    discriminator_loss,
    generator_loss,
    hinge_loss,
    relativistic_loss,
)
from stepdistill.networks.denoiser import Denoiser
from stepdistill.testing.toys import SHAPE, Perceptron, ToyFamily, toy_batch


def convolutions(*shape):
    """(kernel, stride, padding) of the head's convolutions."""
    with torch.device("meta"):
        head = Discriminator(shape)
    found = [layer for layer in head.body if isinstance(layer, nn.Conv2d)]
    return [(*layer.kernel_size, layer.stride[0], layer.padding[0]) for layer in found]


def test_the_head_is_that_of_dmd2():
    """4x4 convolutions to 1x1: one that halves and one of the rest for SD 1.5's 8x8, three and one for SDXL's 32x32."""
    halves = (4, 4, 2, 1)
    assert convolutions(1280, 8, 8) == [halves, (4, 4, 1, 0), (1, 1, 1, 0)]
    assert convolutions(1280, 32, 32) == [halves] * 3 + [(4, 4, 1, 0), (1, 1, 1, 0)]
    with torch.device("meta"):
        first, norm, *_, last = Discriminator((1280, 8, 8)).body
    assert isinstance(first, nn.Conv2d) and isinstance(norm, nn.GroupNorm) and norm.num_groups == 32
    assert isinstance(last, nn.Conv2d) and last.out_channels == 1


def test_a_group_has_four_channels_or_more_and_there_are_as_many_as_that_allows():
    widths = {1: 1, 2: 1, 6: 1, 8: 2, 12: 2, 16: 4, 20: 4, 32: 8, 64: 16, 128: 32, 320: 32}
    assert {width: Discriminator((width, 2, 2)).body[1].num_groups for width in widths} == widths


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 7), (8, 8), (16, 4), (9, 1), (12, 20)])
def test_any_map_gives_one_number(size):
    """A smaller map is met by one convolution as large as it is."""
    head = Discriminator((8, *size))
    assert head(torch.randn(3, 8, *size)).shape == (3,)
    if max(size) <= 4:
        assert convolutions(8, *size) == [(*size, 1, 0), (1, 1, 1, 0)]
    assert convolutions(8, 5, 5)[:2] == [(4, 4, 2, 1), (2, 2, 1, 0)]
    assert convolutions(8, 9, 2)[:2] == [(4, 4, 2, 1), (4, 1, 1, 0)]


def test_the_head_sees_where_things_are_and_how_large():
    """A mirrored map has another logit, and so has a louder one; the rows of tokens are those of the map."""
    torch.manual_seed(0)
    head, x = Discriminator((8, 6, 8)).requires_grad_(False), torch.randn(4, 8, 6, 8)
    plain = head(x)
    assert float((head(x.flip(3)) - plain).abs().min()) > 1e-3
    assert float((head(3 * x) - plain).abs().min()) > 1e-3
    assert torch.equal(head(x.flatten(2).transpose(1, 2)), plain)


def gan():
    return FeatureGan(Denoiser(Perceptron(), FlowPath(), "velocity", ToyFamily()))


def test_a_heads_start_follows_from_its_shape_alone():
    eye = gan().eye
    state = torch.get_rng_state()
    one, two = FeatureGan(eye), FeatureGan(eye)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert {name.split(".")[0] for name, _ in one.named_parameters()} == {
        "head"
    }  # the network it reads is not its own


def logits(own, x, batch, stream="gan"):
    t, eps = batch.draws.uniform(f"{stream} t"), batch.draws.normal(f"{stream} eps", SHAPE)
    return own.logits(FlowPath().noised(x, eps, t), t, batch.cond)


def test_the_generators_loss_falls_where_the_logit_rises():
    """A step against its gradient raises every sample's logit, and its slope at logit D is -sigmoid(-D)."""
    own, batch = gan(), toy_batch(16)
    x = batch.noise.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(own.for_generator(x, batch), x)
    lengths = gradient.flatten(1).norm(dim=1)[:, None, None, None]  # small near pure noise
    with torch.no_grad():
        before, after = (logits(own, x - step * gradient / lengths, batch) for step in (0.0, 1e-2))
    assert bool((after > before).all())
    (by_logit,) = torch.autograd.grad((logits(own, x, batch) * -(-before).sigmoid() / 16).sum(), x)
    torch.testing.assert_close(gradient, by_logit)


def test_the_discriminators_loss_falls_where_it_tells_the_two_apart():
    """A step against its gradient widens the gap of their logits, real above generated; each kind has its own noise and
    times."""
    own, batch = gan(), toy_batch(16)
    made, real = 0.1 * batch.noise, 3 + 0.1 * batch.noise
    images = Examples(real, batch.cond)
    loss = own.for_discriminator(made, images, batch)

    def gap():
        return float((logits(own, real, batch, "gan real") - logits(own, made, batch)).mean())

    with torch.no_grad():
        before = gap()
        expected = nn.functional.softplus(-logits(own, real, batch, "gan real")).mean()
        expected += nn.functional.softplus(logits(own, made, batch)).mean()
    torch.testing.assert_close(loss.detach(), expected)
    gradients = torch.autograd.grad(loss, list(own.parameters()))
    with torch.no_grad():
        for value, gradient in zip(own.parameters(), gradients, strict=True):
            value -= 1e-2 * gradient
        assert gap() > before + 1e-3


class Linear(nn.Module):
    """A head D(f) = w f + b."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, width + 1))

    def forward(self, features):
        return features.flatten(1) @ self.weight


def test_the_gradient_penalty_of_a_linear_head_is_half_its_squared_weight():
    """And its gradient is that weight: the head learns from it, and what it reads does not."""
    own, batch = gan(), toy_batch(16)
    own.head = Linear(32)
    penalty = own.gradient_penalty(Examples(batch.noise, batch.cond), batch)
    torch.testing.assert_close(penalty, 0.5 * own.head.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(own.head.weight.grad, own.head.weight.detach())
    assert all(value.grad is None for value in own.eye.net.parameters())


def test_heads_cost_their_sum_and_zero_ones_n_ln_2():
    """Logits of zero: n ln 2 for the generator, twice that for the discriminator; by the hinge 0 and 2 n."""
    zero = torch.zeros(8, 3)
    torch.testing.assert_close(generator_loss(zero), torch.tensor(3 * math.log(2)))
    torch.testing.assert_close(discriminator_loss(zero, zero), torch.tensor(6 * math.log(2)))
    assert float(hinge_loss(zero, zero)) == 6.0 and float(hinge_loss(1 + zero, zero - 1)) == 0.0
    real, made = torch.randn(8, 3), torch.randn(8, 3)
    each = sum(discriminator_loss(real[:, k], made[:, k]) for k in range(3))
    torch.testing.assert_close(discriminator_loss(real, made), each)
    heads = Heads([(8, 4, 4), (8, 2, 2)])
    maps = [torch.randn(5, 8, 4, 4), torch.randn(5, 8, 2, 2)]
    alone = [head(own) for head, own in zip(heads.each, maps, strict=True)]
    assert torch.equal(heads(maps), torch.stack(alone, 1))


def test_a_gan_of_the_hinge_pushes_every_sample_alike():
    own, batch = gan(), toy_batch(16)
    own.hinge = True
    with torch.no_grad():
        said = logits(own, batch.noise, batch)
    torch.testing.assert_close(own.for_generator(batch.noise, batch).detach(), -said.mean())


def test_the_law_of_times_is_that_of_both_kinds():
    own, batch = gan(), toy_batch(512)
    own.times = lambda draws, stream: draws.uniform(stream, 0.0, 0.6)
    for stream in ("gan", "gan real"):
        _, t = own.noised(batch.noise, batch, stream)
        assert 0.55 < float(t.max()) < 0.6 and float(t.min()) < 0.05


def test_the_hinge_and_the_relativistic_loss_are_their_formulas():
    """What is told apart by more than 1 costs nothing, and differences of logits alone count."""
    real, made = torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge_loss(real, made)) == 1.5 / 2 + 1.5 / 2
    wanted = (math.log1p(math.exp(-5.0)) + math.log1p(math.exp(1.0))) / 2
    assert float(relativistic_loss(real, made)) == pytest.approx(wanted)
    assert float(relativistic_loss(real + 7, made + 7)) == pytest.approx(wanted)


def test_a_head_is_alone_with_a_constant_unless_it_is_asked_for_more(teacher_of):
    own = gan()
    assert own.heads == 1 and own.head.body[-1].bias is not None
    assert logits(own, toy_batch(3).noise, toy_batch(3)).shape == (3,)
    assert Discriminator((8, 4, 4)).body[-1].bias is not None
    assert FeatureGan(own.eye).head.body[-1].out_channels == 1
    assert FeatureGan(own.eye, relativistic=True).head.body[-1].bias is None
    eye = teacher_of("sd").denoiser
    deep = FeatureGan(eye, deep=True)
    assert deep.heads == len(eye.family.feature_layers(eye.net)) == 3 and FeatureGan(eye).heads == 1


@pytest.mark.parametrize("deep", [False, True])
def test_the_gradient_penalty_is_of_whole_maps_and_of_all_heads(deep, teacher_of):
    teacher, batch = teacher_of("sd"), toy_batch(2)
    own, cond = FeatureGan(teacher.denoiser, deep=deep), teacher.codec.encode(["a cat", "a dog"])
    x0 = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    penalty = own.gradient_penalty(Examples(x0, cond), batch)
    seen = own.seen(*own.noised(x0, batch, "gan real"), cond)
    maps = [each.detach().requires_grad_() for each in (seen if deep else [seen])]
    slopes = torch.autograd.grad(own.head(maps if deep else maps[0]).sum(), maps)
    assert all(each[0].numel() > each.shape[1] for each in maps)  # maps, not points
    torch.testing.assert_close(penalty, sum(0.5 * each.square().sum() / 2 for each in slopes))
