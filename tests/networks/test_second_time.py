"""A student's second time: nothing changes at the start, and at one gap it is a stock network again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from jumps_again import check_blocks_that_run_again
from tiny import EMBEDDED, PIPELINES, shaken, tiny_prompts
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import STRAIGHT, on_other_path
from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import TOLERANCE, student_pipeline
from stepdistill.families._recording import record
from stepdistill.families.condition import MASK, Condition
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.derivative import directional_derivative
from stepdistill.networks.pictures import draw_as_pipeline
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.testing.toys import SHAPE, GaussianFlowMap, Perceptron, toy_student

Teachers = Callable[[str], PipelineTeacher]
SLOTS = {"dit": 2, "hunyuan-video": 2, "wan-2.2": 2}
"""Where a network embeds its time more than once."""
DRAWN = ("unet-ddpm", "unet-classes", "dit", "sd", "sd-v", "sdxl", "sd3", "flux", "wan")


TWO = Sampler(uniform_times(2), renoise=False, two_times=True)


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


@pytest.mark.parametrize("name", PIPELINES)
def test_at_the_start_every_jump_is_the_teachers(name: str, teacher_of: Teachers) -> None:
    """Output, jump and velocity equal those without a second time bit for bit at any (t, s), s = t among them;
    where convolutions over frames round a copy's weights in another order, to 1e-5."""
    teacher = teacher_of(name)

    def equal(ours: Tensor, wanted: Tensor) -> bool:
        near = name == "text-to-video"
        return torch.allclose(ours, wanted, rtol=1e-5, atol=1e-5) if near else torch.equal(ours, wanted)

    plain, student = Student.from_teacher(teacher), two_timed(teacher)
    assert student.two_times and not plain.two_times
    x, cond = points(teacher, name)
    start, end = torch.tensor([1.0, 0.9, 0.503, 0.2]), torch.tensor([0.0, 0.4, 0.503, 0.0])
    with torch.no_grad():
        own = plain.raw(x, start, cond)
        assert equal(student.raw(x, start, cond, end), own)
        assert equal(student.raw(x, start, cond), own)
        if name not in EMBEDDED:  # of which a student has its scale folded in
            assert equal(teacher.denoiser.raw(x, start, cond), own)
        flow = student.flow_velocity(x, start, end, cond)
        assert equal(flow, plain.flow_velocity(x, start, end, cond))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_second_time_is_trained_and_then_tells_jumps_apart(name: str, teacher_of: Teachers) -> None:
    """All zero weights get a gradient at the start; then s changes the output, for each sample as for it alone."""
    teacher = teacher_of(name)
    student = two_timed(teacher)
    x, cond = points(teacher, name)
    t, s = torch.tensor([0.95, 0.8, 0.3, 0.8]), torch.tensor([0.3, 0.8, 0.0, 0.3])
    student.raw(x, t, cond, s).square().mean().backward()  # type: ignore[no-untyped-call]
    zero = [
        value
        for key, value in student.net.named_parameters()
        if key.endswith(("slots.of.own.last.weight", "cond_proj.weight", "class_embedding.linear_2.weight"))
    ]
    assert len(zero) == SLOTS.get(name, 1)
    assert all(value.grad is not None and bool(value.grad.any()) for value in zero)
    moved = two_timed(teacher, moved=True)
    with torch.no_grad():
        one, other = (moved.raw(x, t, cond, end) for end in (s, t))
        last = moved.raw(x[3:], t[3:], cond.rows(slice(3, 4)), s[3:])
        same = moved.raw(x, t, cond)
    assert float((one - other)[[0, 2, 3]].abs().amax((1, 2, 3) if x.ndim == 4 else (1, 2, 3, 4)).min()) > 3e-4
    torch.testing.assert_close(one[1], other[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(one[3:], last, atol=3e-4, rtol=0)
    assert torch.equal(same, other)  # nothing said is a jump of no length


def test_a_network_that_embeds_no_time_says_so() -> None:
    toy = toy_student(Perceptron(), FlowPath(), "velocity")
    with pytest.raises(UserError, match="a Perceptron has no layers that embed its timestep"):
        NetworkChanges().second_time(toy.net)


def test_a_guidance_embedding_leaves_room_for_it(teacher_of: Teachers) -> None:
    student = Student.from_teacher(teacher_of("sd"))
    student.add_guidance_input()
    assert not student.two_times
    student.add_second_time()
    assert student.two_times and student.family.changes.takes_guidance(student.net)


@pytest.mark.parametrize(
    "name", [name for name in PIPELINES if name not in ("klein", "flux-2")]
)  # which have no biases
def test_a_student_of_equal_jumps_folds_into_the_stock_class(name: str, teacher_of: Teachers) -> None:
    """The embedding of a constant t - s is a bias: same class, same config as the teacher's, same pictures."""
    teacher = teacher_of(name)
    student = two_timed(teacher, moved=True)
    x, cond = points(teacher, name)
    plain = Student.from_teacher(teacher).net  # the teacher's, but for guidance
    for steps in (1, 4):
        sampler = Sampler(uniform_times(steps), renoise=False, two_times=True)
        folded: Any = student.stock_net(sampler, lambda: cond.rows(slice(1)))
        assert type(folded) is type(plain)
        assert {k: v for k, v in folded.config.items() if k[0] != "_"} == {
            k: v for k, v in plain.config.items() if k[0] != "_"
        }
        assert set(folded.state_dict()) == set(plain.state_dict()) and student.two_times
        stock = Student(folded, student.path, student.output, student.family)
        assert not stock.two_times
        t = torch.tensor([1.0, 0.75, 0.6, 0.3])
        with torch.no_grad():
            jump, same = student.raw(x, t, cond, t - 1 / steps), stock.raw(x, t, cond)
            still = student.raw(x, t, cond)
        assert float((jump - same).norm() / jump.norm()) < 2e-6
        assert float((jump - still).norm() / jump.norm()) > 3e-5
        if name in DRAWN:
            with torch.no_grad():
                wanted = sampler.draw(student, x, cond, lambda i: x)
                drawn = Sampler(sampler.times, renoise=False).draw(stock, x, cond, lambda i: x)
            # Folding adds in another order: 1e-6 of the output, times the sigma / alpha of reading x0 at pure noise.
            assert float((drawn - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("name", ["sd", "dit", "flux", "wan-2.2"])
def test_a_role_of_a_shared_network_has_a_second_time_of_its_own(name: str, teacher_of: Teachers) -> None:
    """The student's slot is beside its adapter: nobody else is told, and merged and folded it is a stock network."""
    teacher = teacher_of(name)
    roles = Adapters(teacher, 2)
    student, before = roles.student, set(roles.weights("student"))
    student.add_second_time()
    fake, follower = roles.add("fake"), cast(Student, roles.add("follower", "student", trained=False))
    assert student.two_times and not roles.teacher.denoiser.adapter.has_slots
    x, cond = points(teacher, name)
    t, s = torch.tensor([1.0, 0.9, 0.8, 0.5]), torch.tensor([0.5, 0.4, 0.3, 0.0])
    with torch.no_grad():
        own = roles.teacher.denoiser.raw(x, t, cond)
        assert torch.equal(student.raw(x, t, cond, s), own)
        kept = {key: value.clone() for key, value in roles.state().items()}
        shaken(nn.ParameterList(roles.parameters("student")), 0.3)
        for other in (roles.teacher.denoiser, fake, follower):
            assert torch.equal(other.raw(x, t, cond), own)
        moved = student.raw(x, t, cond, s)
        assert float((moved - student.raw(x, t, cond)).abs().max()) > 1e-4
        roles.become("follower", "student")
        assert torch.equal(follower.raw(x, t, cond, s), moved)
        stock = Student(student.stock_net(TWO), student.path, student.output, student.family)
        plain = Student.from_teacher(teacher).net
        assert set(stock.net.state_dict()) == set(plain.state_dict())
        assert float((stock.raw(x, t, cond) - moved).abs().max()) < 2e-6 * float(moved.abs().max())
        roles.load(kept)
        assert torch.equal(student.raw(x, t, cond, s), own)
    added = set(roles.weights("student")) - before
    assert len(added) == 4 * SLOTS.get(name, 1) and set(roles.weights("fake")) == before
    assert set(roles.weights("follower")) == set(roles.weights("student"))
    assert all(value.requires_grad for value in roles.parameters("student"))
    assert not any(value.requires_grad for value in roles.parameters("follower"))


def test_a_recorded_network_that_is_called_for_some_rows_is_told_their_jumps(teacher_of: Teachers) -> None:
    """Z-Image's prompts are lists, which a recording takes for one length at a time: it says what the family says."""
    teacher = teacher_of("z-image")
    student = two_timed(teacher, moved=True)
    ours: Any = record(teacher.pipe, student.path, student.output, teacher.size, guidance=1.0)
    state = ours.state_shape(teacher.pipe, teacher.size)
    recorded = Denoiser(student.net, student.path, student.output, ours, state)
    x, cond = points(teacher, "z-image")
    heard = ours.encode(teacher.pipe, tiny_prompts("z-image", 4), teacher.size)
    masks = [heard[f"{name}.{MASK}"].sum(1) for name in ours.found.lengths]
    assert len(torch.stack(masks, 1).unique(dim=0)) > 1
    t, s = torch.tensor([1.0, 0.9, 0.8, 0.5]), torch.tensor([0.0, 0.8, 0.3, 0.1])
    with torch.no_grad():
        wanted = student.raw(x, t, cond, s)
        said = recorded.raw(x.reshape(4, *state), t, heard, s).reshape(wanted.shape)
    assert float((said - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("adapted", [False, True])
def test_blocks_that_run_again_are_told_the_same_jump(adapted: bool, teacher_of: Teachers) -> None:
    """In DiT every block has a slot: gradients with checkpointed blocks are those without, with other calls between."""
    teacher = teacher_of("dit")
    roles = Adapters(teacher, 2) if adapted else Copies(teacher)
    roles.student.add_second_time()
    shaken(nn.ParameterList(roles.parameters("student")), 0.3)
    x, cond = points(teacher, "dit")
    t = torch.tensor([1.0, 0.9, 0.8, 0.5])
    check_blocks_that_run_again(roles, x, t, cond, 0.2 * t)


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


@pytest.mark.parametrize("name", ["sd3", "klein", "wan-2.2", "dit", "hunyuan-video"])
def test_jumps_of_unequal_length_fold_at_their_times(name: str, teacher_of: Teachers) -> None:
    """Into the weights of what embeds the time, also where there is no bias; every jump is said, each by its own."""
    teacher = teacher_of(name)
    student = two_timed(teacher, moved=True)
    x, cond = points(teacher, name)
    for times in ((1.0, 0.9, 0.6, 0.2), (1.0, 0.75, 0.5, 0.25)):
        sampler = Sampler(times, renoise=False, two_times=True)
        net = student.stock_net(sampler, lambda: cond.rows(slice(1)))
        stock = Student(net, student.path, student.output, student.family)
        t, s = torch.tensor(times), torch.tensor([*times[1:], 0.0])
        with torch.no_grad():
            jump, same, still = student.raw(x, t, cond, s), stock.raw(x, t, cond), student.raw(x, t, cond)
        assert not stock.two_times
        assert float((jump - same).norm() / jump.norm()) < 3e-6
        assert float((jump - still).norm() / jump.norm()) > 3e-5


def test_jumps_of_unequal_length_are_refused_where_one_alone_can_be_held(teacher_of: Teachers) -> None:
    for name in ("unet-ddpm", "sd"):
        with pytest.raises(UserError, match="jumps of unequal length"):
            two_timed(teacher_of(name)).stock_net(Sampler((1.0, 0.3), renoise=False, two_times=True))


def test_a_network_with_one_time_folds_to_itself() -> None:
    student = toy_student(Perceptron(), FlowPath(), "velocity")
    assert student.stock_net(TWO) is student.net


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
