"""Features at several depths of a network, and the heads that read them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import tiny_prompts, tiny_teacher
from torch import Tensor

from stepdistill.families.condition import Condition
from stepdistill.losses.gan import FeatureGan
from stepdistill.networks.switched import networks_in
from stepdistill.networks.teacher import PipelineTeacher


def inputs(teacher: PipelineTeacher, name: str, count: int = 3) -> tuple[Tensor, Tensor, Condition]:
    cond = teacher.codec.encode(tiny_prompts(name, count))
    x = torch.randn(count, *teacher.codec.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.2, 0.5, 0.9])[:count], cond


# Of each kind: UNets, blocks of one stream and of two, tokens before and behind the prompt's, several networks, prompts
# that are called apart.
KINDS = (
    "unet-ddpm",
    "sd",
    "sdxl",
    "dit",
    "sd3",
    "flux",
    "aura-flow",
    "lumina2",
    "z-image",
    "wan-2.2",
    "kandinsky5",
)


@pytest.mark.parametrize("name", KINDS)
def test_each_depth_is_seen_once_in_its_stated_shape(name: str) -> None:
    """One of them is where a single head looks; equal features whether one or several modules are watched."""
    teacher = tiny_teacher(name)
    denoiser, family = teacher.denoiser, teacher.family
    x, t, cond = inputs(teacher, name)
    with torch.no_grad():
        maps, one = denoiser.feature_maps(x, t, cond), denoiser.features(x, t, cond)
    shapes = family.layer_shapes(networks_in(denoiser.net)[0], denoiser.shape)
    assert len(maps) == len(shapes)
    for own, (width, height, breadth) in zip(maps, shapes, strict=True):
        assert own.shape[1:] in {(width, height, breadth), (height * breadth, width)}
    assert any(own.shape == one.shape and torch.equal(own, one) for own in maps)
    assert all(not torch.equal(a, b) for a, b in pairwise(maps) if a.shape == b.shape)
    gan = FeatureGan(denoiser, deep=True)
    assert gan.logits(x, t, cond).shape == (3, gan.heads) and gan.heads == len(maps)


def test_a_unet_is_seen_on_its_way_down_and_in_its_middle() -> None:
    teacher = tiny_teacher("sd")
    net = teacher.denoiser.net
    *down, middle = teacher.family.feature_layers(net)
    assert middle is net.get_submodule("mid_block") and len(down) == 2
    names = {id(module): name for name, module in net.named_modules()}
    assert all(names[id(module)].startswith("down_blocks") for module in down)
    sizes = [shape[1] for shape in teacher.family.layer_shapes(net, teacher.codec.shape)]
    assert sizes[0] > sizes[-1] and sizes == sorted(sizes, reverse=True)


def test_the_gradient_of_every_depth_reaches_the_sample_and_not_the_teacher() -> None:
    teacher = tiny_teacher("sd3")
    x, t, cond = inputs(teacher, "sd3")
    x.requires_grad_(True)
    for own in teacher.denoiser.feature_maps(x, t, cond):
        (slope,) = torch.autograd.grad(own.sum(), x, retain_graph=True)
        assert bool((slope.flatten(1).abs().sum(1) > 0).all())
    assert all(value.grad is None for value in teacher.denoiser.net.parameters())
