"""Late blocks that are told the end of a jump: the teacher where s = t, no new weights, and stock at its own jumps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from jumps_again import check_blocks_that_run_again
from tiny import EMBEDDED, PIPELINES, shaken, tiny_prompts
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._second_time import told_of
from stepdistill.families.condition import Condition
from stepdistill.networks.derivative import directional_derivative
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]
ABLE = {
    "unet-ddpm": "up_blocks",
    "unet-ddim": "up_blocks",
    "sd": "up_blocks",
    "sd-v": "up_blocks",
    "dit": "transformer_blocks",
}
"""Pipelines whose network has late blocks, and where they are."""

START, END = torch.tensor([1.0, 0.9, 0.503, 0.2]), torch.tensor([0.0, 0.4, 0.503, 0.0])


def late(teacher: PipelineTeacher, moved: bool = False) -> Student:
    student = Student.from_teacher(teacher)
    student.add_second_time("late_blocks")
    if moved:
        shaken(student.net, 0.3)
    return student


def points(teacher: PipelineTeacher, name: str) -> tuple[Tensor, Condition]:
    x = torch.randn(4, *teacher.codec.shape, generator=torch.Generator().manual_seed(1))
    return x, teacher.codec.encode(tiny_prompts(name, 4))


def heard(student: Student, x: Tensor, t: Tensor, cond: Condition, s: Tensor | None) -> dict[str, Tensor]:
    """What each layer of blocks that reads a time alone is given in a call, by name."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        return lambda layer, args: found.update({name: args[0]})

    handles = [
        layer.register_forward_pre_hook(look(name))
        for name, layer in student.net.named_modules()
        if name.endswith(("time_emb_proj", "norm1.emb.timestep_embedder.linear_2"))
    ]
    with torch.no_grad():
        student.raw(x, t, cond, s)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ABLE)
def test_a_jump_of_no_length_is_the_teachers_and_there_are_no_new_weights(
    name: str, teacher_of: Teachers
) -> None:
    """G5 of the card: bit for bit; off the diagonal it is another network from the start."""
    teacher = teacher_of(name)
    plain, student = Student.from_teacher(teacher), late(teacher)
    assert student.two_times and not plain.two_times
    assert student.net.state_dict().keys() == plain.net.state_dict().keys()
    x, cond = points(teacher, name)
    with torch.no_grad():
        own = plain.raw(x, START, cond)
        assert torch.equal(student.raw(x, START, cond, START), own)
        assert torch.equal(student.raw(x, START, cond), own)
        jump = student.raw(x, START, cond, END)
    assert torch.equal(jump[2], own[2])
    assert float((jump - own)[[0, 1, 3]].abs().amax((1, 2, 3)).min()) > 1e-4


@pytest.mark.parametrize("name", ABLE)
def test_early_blocks_hear_the_start_and_late_ones_the_end(name: str, teacher_of: Teachers) -> None:
    """Each layer that reads a time is given what the network called at t, or at s, would give it."""
    teacher = teacher_of(name)
    plain, student = Student.from_teacher(teacher), late(teacher)
    x, cond = points(teacher, name)
    both, at_t, at_s = (
        heard(one, x, t, cond, s)
        for one, t, s in ((student, START, END), (plain, START, None), (plain, END, None))
    )
    blocks = len(plain.net.get_submodule(ABLE[name]))  # type: ignore[arg-type]
    first = 0 if ABLE[name] == "up_blocks" else round(blocks * 5 / 7)
    told = {f"{ABLE[name]}.{i}" for i in range(first, blocks)}
    ends = {layer for layer in both if ".".join(layer.split(".")[:2]) in told}
    assert ends and ends < both.keys()
    for layer, given in both.items():
        assert torch.equal(given, (at_s if layer in ends else at_t)[layer])
        assert not torch.equal(at_s[layer], at_t[layer])


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), (1.0, 0.9, 0.6, 0.2)])
@pytest.mark.parametrize("name", ABLE)
def test_at_its_own_jumps_it_is_a_stock_network(
    name: str, times: tuple[float, ...], teacher_of: Teachers
) -> None:
    """Told t alone, the folded network says what this one says of each jump; class, config and keys are the
    teacher's."""
    teacher = teacher_of(name)
    student = late(teacher, moved=True)
    x, cond = points(teacher, name)
    sampler = Sampler(times, renoise=False, two_times=True)
    folded: Any = student.stock_net(sampler, lambda: cond.rows(slice(1)))
    plain = Student.from_teacher(teacher).net
    assert type(folded) is type(plain) and folded.state_dict().keys() == plain.state_dict().keys()
    assert folded.config == plain.config and student.two_times
    assert not any(module._forward_pre_hooks for module in folded.modules())
    stock = Student(folded, student.path, student.output, student.family)
    assert not stock.two_times
    for t, s in zip(times, [*times[1:], 0.0], strict=True):
        start, end = torch.full((4,), t), torch.full((4,), s)
        with torch.no_grad():
            jump, same = student.raw(x, start, cond, end), stock.raw(x, start, cond)
            still = student.raw(x, start, cond)
        assert float((jump - same).norm() / jump.norm()) < 3e-6
        assert float((jump - still).norm() / jump.norm()) > 1e-4


def test_networks_without_late_blocks_say_what_to_do(teacher_of: Teachers) -> None:
    for name, says in {
        "sdxl": "UNet2DConditionModel embeds texts or sizes beside it: set it to embedded",
        "unet-classes": "UNet2DModel embeds its class beside it",
        "flux": "not a FluxTransformer2DModel: set it to embedded",
        "wan-2.2": "but this teacher has 2 networks",
    }.items():
        with pytest.raises(UserError, match=says):
            late(teacher_of(name))
    guided = Student.from_teacher(teacher_of("sd"))
    guided.add_guidance_input()
    with pytest.raises(UserError, match="embeds guidance beside it"):
        guided.add_second_time("late_blocks")
    assert len(PIPELINES) > len(ABLE) + len(EMBEDDED)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_copy_is_told_of_its_own_jumps(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    student = late(teacher, moved=True)
    twin = copy.deepcopy(student.net)
    assert told_of(twin) is not told_of(student.net)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
    x, cond = points(teacher, name)
    other = Student(twin, student.path, student.output, student.family)
    with torch.no_grad():
        assert float(student.raw(x, START, cond, END).abs().max()) > 0
        assert float(other.raw(x, START, cond, END).abs().max()) == 0  # its time embedding is its own, too


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_role_of_a_shared_network_has_late_blocks_of_its_own(name: str, teacher_of: Teachers) -> None:
    """Nobody else is told the end; merged and folded it is a stock network."""
    teacher = teacher_of(name)
    roles = Adapters(teacher, 2)
    student, before = roles.student, set(roles.weights("student"))
    student.add_second_time("late_blocks")
    fake = roles.add("fake")
    follower = cast(Student, roles.add("follower", "student", trained=False))
    assert student.two_times and set(roles.weights("student")) == before
    x, cond = points(teacher, name)
    with torch.no_grad():
        own = roles.teacher.denoiser.raw(x, START, cond)
        assert torch.equal(student.raw(x, START, cond, START), own)
        shaken(nn.ParameterList(roles.parameters("student")), 0.3)
        for other in (roles.teacher.denoiser, fake):
            assert torch.equal(other.raw(x, START, cond), own)
        moved = student.raw(x, START, cond, END)
        assert float((moved - student.raw(x, START, cond))[[0, 1, 3]].abs().max()) > 1e-4
        roles.become("follower", "student")
        assert torch.equal(follower.raw(x, START, cond, END), moved)
        t, s = torch.ones(4), torch.full((4,), 0.5)
        jump = student.raw(x, t, cond, s)
        sampler = Sampler((1.0, 0.5), renoise=False, two_times=True)
        net = student.stock_net(sampler, lambda: cond.rows(slice(1)))
        same = Student(net, student.path, student.output, student.family).raw(x, t, cond)
    assert net.state_dict().keys() == Student.from_teacher(teacher).net.state_dict().keys()
    assert float((same - jump).norm() / jump.norm()) < 3e-6


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["sd", "dit"])
def test_blocks_that_run_again_are_told_the_same_end(name: str, adapted: bool, teacher_of: Teachers) -> None:
    roles = Adapters(teacher_of(name), 2) if adapted else Copies(teacher_of(name))
    roles.student.add_second_time("late_blocks")
    shaken(nn.ParameterList(roles.parameters("student")), 0.3)
    x, cond = points(teacher_of(name), name)
    check_blocks_that_run_again(roles, x, START, cond, END)


@pytest.mark.parametrize("name", ["unet-ddpm", "dit"])
def test_velocities_have_derivatives_in_both_times(name: str, teacher_of: Teachers) -> None:
    """Forward-mode through the late blocks, and the tangents of t and s told apart."""
    teacher = teacher_of(name)
    student = late(teacher, moved=True)
    x, cond = points(teacher, name)
    t, s = torch.tensor([0.31, 0.52, 0.13, 0.66]), torch.tensor([0.1, 0.2, 0.05, 0.5])

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return student.flow_velocity(x, t, s, cond)

    zero, one, rates = torch.zeros(4), torch.ones(4), []
    for tangents in ((x, one, zero), (torch.zeros_like(x), zero, one)):
        rates.append(directional_derivative(u, (x, t, s), tangents))
        near = directional_derivative(u, (x, t, s), tangents, "difference", 1e-4)
        assert float((rates[-1] - near).norm() / near.norm()) < 3e-2
    assert all(bool((rate.flatten(1).norm(dim=1) > 1e-3).all()) for rate in rates)
