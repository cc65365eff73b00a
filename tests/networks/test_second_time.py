"""A student's second time: nothing changes at the start, and at one gap it is a stock network again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import shaken, tiny_prompts
from torch import Tensor
from toy import SHAPE, GaussianFlowMap, Perceptron, toy_student

from stepdistill.diffusion.change_of_path import STRAIGHT, on_other_path
from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import TOLERANCE, student_pipeline
from stepdistill.families.condition import Condition
from stepdistill.networks.derivative import directional_derivative
from stepdistill.networks.pictures import draw_as_pipeline
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher

Teachers = Callable[[str], PipelineTeacher]
ABLE = ("unet-ddpm", "unet-ddim", "sd", "sd-v", "sdxl")
UNABLE = ("unet-classes", "dit", "sd3")


def two_timed(teacher: PipelineTeacher, moved: bool = False) -> Student:
    """A student with a second time, at its start or moved off it."""
    student = Student.from_teacher(teacher)
    student.add_second_time()
    if moved:
        shaken(student.net, 0.3)
    return student


def points(teacher: PipelineTeacher, name: str) -> tuple[Tensor, Condition]:
    x = torch.randn(4, *teacher.codec.shape, generator=torch.Generator().manual_seed(1))
    return x, teacher.codec.encode(tiny_prompts(name, 4))


@pytest.mark.parametrize("name", ABLE)
def test_at_the_start_every_jump_is_the_teachers(name: str, teacher_of: Teachers) -> None:
    """Output, jump and velocity equal those without a second time bit for bit at any (t, s), s = t among them."""
    teacher = teacher_of(name)
    plain, student = Student.from_teacher(teacher), two_timed(teacher)
    assert student.two_times and not plain.two_times
    x, cond = points(teacher, name)
    for t, s in ((1.0, 0.0), (0.9, 0.4), (0.503, 0.503), (0.2, 0.0)):
        start, end = torch.full((4,), t), torch.full((4,), s)
        with torch.no_grad():
            assert torch.equal(student.raw(x, start, cond, end), teacher.denoiser.raw(x, start, cond))
            assert torch.equal(student.raw(x, start, cond), teacher.denoiser.raw(x, start, cond))
            jump = student.predict(x, start, cond, end).at(end)
            assert torch.equal(jump, plain.predict(x, start, cond).at(end))
            flow = student.flow_velocity(x, start, end, cond)
            assert torch.equal(flow, plain.flow_velocity(x, start, end, cond))


@pytest.mark.parametrize("name", ABLE)
def test_the_second_time_is_trained_and_then_tells_jumps_apart(name: str, teacher_of: Teachers) -> None:
    """The zero weights get a gradient at the start, and after a change of weights s changes the output."""
    teacher = teacher_of(name)
    student = two_timed(teacher)
    x, cond = points(teacher, name)
    t, s = torch.full((4,), 0.8), torch.full((4,), 0.3)
    student.raw(x, t, cond, s).square().mean().backward()  # type: ignore[no-untyped-call]
    named = dict(student.net.named_parameters())
    slot = "class_embedding.linear_2.weight" if "unet" in name else "time_embedding.cond_proj.weight"
    gradient = named[slot].grad
    assert gradient is not None and bool(gradient.any())
    moved = two_timed(teacher, moved=True)
    with torch.no_grad():
        one, other = (moved.flow_velocity(x, t, end, cond) for end in (s, torch.zeros(4)))
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("name", UNABLE)
def test_families_without_a_slot_say_so(name: str, teacher_of: Teachers) -> None:
    student = Student.from_teacher(teacher_of(name))
    with pytest.raises(UserError, match="needs a network with a second time"):
        student.add_second_time()
    assert not student.two_times


def test_a_lora_cannot_hold_it(teacher_of: Teachers) -> None:
    student = Adapters(teacher_of("sd"), 2).student
    with pytest.raises(UserError, match=r"set student\.lora_rank=0"):
        student.add_second_time()


def test_the_slot_is_not_shared_with_a_guidance_embedding(teacher_of: Teachers) -> None:
    student = Student.from_teacher(teacher_of("sd"))
    student.add_guidance_input()
    with pytest.raises(UserError, match="slot taken by a guidance embedding"):
        student.add_second_time()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ABLE)
def test_a_student_of_equal_jumps_folds_into_the_stock_class(
    name: str, steps: int, teacher_of: Teachers
) -> None:
    """The embedding of a constant t - s is a bias: same class, same config as the teacher's, same pictures."""
    teacher = teacher_of(name)
    student = two_timed(teacher, moved=True)
    sampler = Sampler(uniform_times(steps), renoise=False, two_times=True)
    folded: Any = student.stock_net(sampler.gap)
    assert type(folded) is type(teacher.denoiser.net)
    assert {k: v for k, v in folded.config.items() if k[0] != "_"} == {
        k: v for k, v in teacher.denoiser.net.config.items() if k[0] != "_"
    }
    assert set(folded.state_dict()) == set(teacher.denoiser.net.state_dict())
    stock = Student(folded, student.path, student.output, student.family)
    assert not stock.two_times
    x, cond = points(teacher, name)
    with torch.no_grad():
        wanted = sampler.draw(student, x, cond, lambda i: x)
        drawn = Sampler(sampler.times, renoise=False).draw(stock, x, cond, lambda i: x)
        unfolded = sampler.draw(two_timed(teacher), x, cond, lambda i: x)
    # Folding adds in another order: 1e-6 of the output, times the sigma / alpha of reading x0 at pure noise.
    assert float((drawn - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert float((unfolded - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["unet-ddpm", "sd"])
def test_a_stock_pipeline_draws_several_jumps_as_the_trainer_does(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    student = two_timed(teacher, moved=True)
    plain = Sampler(uniform_times(3), renoise=False, two_times=True)
    sampler = on_stock_grid(plain, student.path, teacher.pipe.scheduler)
    pipe, prompts, seeds = student_pipeline(student, sampler, teacher), tiny_prompts(name, 2), (0, 1)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    call = teacher.family.call_arguments(type(pipe).__name__, prompts, None, None)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = pipe(**call, num_inference_steps=3, generator=generators, output_type="np").images
    images = torch.tensor(drawn).permute(0, 3, 1, 2)
    ours = draw_as_pipeline(student, sampler, teacher.codec, prompts, seeds)
    difference = (images - ours).abs() * 255
    assert float(difference.max()) <= TOLERANCE["max"] and float(difference.mean()) < 0.1
    assert float(ours.std()) > 0.01


def test_jumps_of_unequal_length_do_not_fold() -> None:
    with pytest.raises(UserError, match="jumps of unequal length"):
        _ = Sampler((1.0, 0.3), renoise=False, two_times=True).gap
    assert Sampler((1.0, 0.5), renoise=False).gap == 0.5


def test_a_network_with_one_time_folds_to_itself() -> None:
    student = toy_student(Perceptron(), FlowPath(), "velocity")
    assert student.stock_net(1.0) is student.net


def test_any_number_of_jumps_of_the_exact_map_ends_where_one_does() -> None:
    """The sampler tells each jump its end: the Gaussian's flow map sends z to mu + c z in 1, 2, 3 and 8 of them."""
    student = toy_student(GaussianFlowMap(0.7, 0.4), FlowPath(), "velocity")
    z = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    for times in (*map(uniform_times, (1, 2, 3, 8)), (1.0, 0.9, 0.2)):
        drawn = Sampler(times, renoise=False, two_times=True).draw(student, z, Condition(), lambda i: z)
        torch.testing.assert_close(drawn, 0.7 + 0.4 * z, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["unet-ddpm", "sd-v"])
def test_flow_velocities_of_a_table_student_have_derivatives(name: str, teacher_of: Teachers) -> None:
    """On the straight path through table and timestep: jvp along t equals the difference, where h resolves 1000 t."""
    teacher = teacher_of(name)
    assert isinstance(teacher.path, TablePath)
    student = two_timed(teacher, moved=True)
    x, cond = points(teacher, name)
    t, s = torch.tensor([0.31, 0.52, 0.13, 0.66]), torch.tensor([0.0, 0.2, 0.05, 0.5])

    def u(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return student.flow_velocity(x, t, s, cond)

    zero, one = torch.zeros(4), torch.ones(4)
    for tangents, h in (((x, zero, zero), 2e-3), ((torch.zeros_like(x), zero, one), 2e-3)):
        exact = directional_derivative(u, (x, t, s), tangents)
        near = directional_derivative(u, (x, t, s), tangents, "difference", h)
        assert float((exact - near).norm() / exact.norm()) < 2e-2
        assert bool((exact.flatten(1).norm(dim=1) > 1e-3).all())  # also for the jump that ends at clean data


def test_times_that_snap_to_a_timestep_keep_their_derivative(teacher_of: Teachers) -> None:
    family, path = teacher_of("unet-ddpm").family, teacher_of("unet-ddpm").path
    t = torch.tensor([0.5, 0.5004, 0.75, 1.0])
    value, rate = torch.func.jvp(lambda t: family.time(path, t), (t,), (torch.ones(4),))
    assert torch.equal(value[[0, 2, 3]], torch.tensor([499.0, 749.0, 999.0]))
    torch.testing.assert_close(rate, torch.full((4,), 1000.0))
    # The schedule too, at entries of the table, both ends of it, and between: alpha' and sigma' as `rates` has them.
    t = torch.tensor([0.0, 0.001, 0.5, 0.5004, 0.75, 1.0])
    for i in (0, 1):
        rate = torch.func.jvp(lambda t, i=i: path.alpha_sigma(t)[i], (t,), (torch.ones(6),))[1]
        torch.testing.assert_close(rate, path.rates(t)[i], atol=1e-5, rtol=1e-5)


def test_a_point_carried_to_another_path_and_back_is_itself(teacher_of: Teachers) -> None:
    path = teacher_of("unet-ddpm").path
    x = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9])
    there, own_t = on_other_path(STRAIGHT, x, t, path)
    back, same = on_other_path(path, there, own_t, STRAIGHT)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, t, atol=1e-5, rtol=1e-5)
