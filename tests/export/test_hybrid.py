"""A hybrid pipeline: the guided teacher's first steps and then the student's, as both take them by themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from student_toy import assert_same, drawn, kept
from tiny import call_of, shaken, tiny_prompts

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.hybrid import write_hybrid
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.families.watching import watch
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.system.travelling import travelling_module

GUIDANCE = 3.0
SAMPLERS = {
    "sd": Sampler(uniform_times(4), True),
    "sdxl": Sampler(uniform_times(2), False),
    "sd3": Sampler((1.0, 0.75), False),
    "dit": Sampler(uniform_times(2), False),
}


def exported(teacher: Any, name: str, folder: Any, change: Any = None) -> Student:
    """A perturbed student of a tiny teacher, and its folder."""
    passes, scheduler = teacher.family.passes, teacher.pipe.scheduler
    sampler = on_stock_grid(SAMPLERS[name], teacher.path, scheduler, passes=passes)
    student = Copies(teacher).student
    if change:
        change(student)
    shaken(student.net)
    export(student, sampler, teacher, folder, tiny_prompts(name, 2), "# A card\n", seeds=(0, 1))
    return student


def pixels(folder: Any) -> Any:
    return drawn(load_pipeline(folder)[0], folder)


def test_without_a_teachers_call_it_is_the_student(teacher_of, tmp_path):
    teacher = teacher_of("sd")
    exported(teacher, "sd", tmp_path / "student")
    write_hybrid(teacher, "tiny", tmp_path / "student", tmp_path / "none", guidance=GUIDANCE, calls=0)
    assert torch.equal(pixels(tmp_path / "none"), pixels(tmp_path / "student"))
    assert not list((tmp_path / "none").rglob("*.py"))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_with_all_calls_it_is_the_guided_teacher_on_that_grid(name, teacher_of, tmp_path):
    """Each step of the stock pipeline under guidance, on the deterministic scheduler of that grid: the expert's outputs
    are its outputs to the last digits, and so are the states."""
    teacher = teacher_of(name)
    exported(teacher, name, tmp_path / "student")
    count, path = SAMPLERS[name].steps, teacher.path
    made = write_hybrid(
        teacher, "tiny", tmp_path / "student", tmp_path / "all", guidance=GUIDANCE, calls=count
    )
    assert made.teacher_calls == count
    passes, scheduler = teacher.family.passes, teacher.pipe.scheduler
    plain = stock_scheduler(replace(SAMPLERS[name], renoise=False), path, scheduler, passes)
    prompts = tiny_prompts(name, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    stock = {"num_inference_steps": count, "output_type": "np"}
    wanted = watch(
        teacher.pipe, {**call_of(name, prompts, GUIDANCE), **stock, "generator": generators}, scheduler=plain
    )
    pipe = load_pipeline(tmp_path / "all")[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    found = watch(pipe, {**call_of(name, prompts, 0.0), **stock, "generator": generators})
    for one, two in zip(found.steps, wanted.steps, strict=True):
        size = float(two.output.abs().max())  # DiTPipeline hands its scheduler every guided row twice
        assert torch.allclose(one.output, two.output[:2], rtol=0, atol=2e-6 * size)
        assert torch.allclose(one.result, two.result[:2], rtol=0, atol=1e-5 * float(two.result.abs().max()))
    plain_call = {**call_of(name, prompts, 0.0), **stock}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    unguided = watch(teacher.pipe, {**plain_call, "generator": generators}, scheduler=plain)
    assert not torch.allclose(found.steps[0].output, unguided.steps[0].output, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grid"), [("sd", None), ("sd", 8), ("sdxl", None), ("sd3", 4)])
def test_plain_diffusers_draws_the_teachers_first_steps_and_the_students_others(
    name, grid, teacher_of, tmp_path
):
    """As both draw them by themselves, without stepdistill in the process; at the boundary the student is called."""
    teacher = teacher_of(name)
    student = exported(teacher, name, tmp_path / "student")
    folder = tmp_path / "hybrid"
    made = write_hybrid(teacher, "tiny", tmp_path / "student", folder, guidance=GUIDANCE, calls=1, grid=grid)
    assert str(verify(folder)).startswith("verified")
    assert_same(pixels(folder), kept(folder))
    assert made.teacher_calls == (2 if grid else 1)
    net: Any = getattr(made.pipe, teacher.family.network)
    called: list[int] = []
    for number, expert in enumerate(net.experts):
        expert.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    drawn(made.pipe, folder)
    assert called == [0] * made.teacher_calls + [1] * (SAMPLERS[name].steps - 1)
    state = net.experts[1].state_dict()
    assert all(torch.equal(state[key], value) for key, value in student.net.state_dict().items())
    # Neither the student's pictures nor those of the teacher.
    assert (pixels(folder).int() - pixels(tmp_path / "student").int()).abs().max() > 8


def test_a_smaller_student_goes_on_from_its_teacher(teacher_of, tmp_path):
    teacher = teacher_of("sd")
    exported(teacher, "sd", tmp_path / "student", lambda student: student.make_slimmer(0.5, 1.0))
    write_hybrid(teacher, "tiny", tmp_path / "student", tmp_path / "hybrid", guidance=GUIDANCE, calls=2)
    verify(tmp_path / "hybrid")


def normal(x: Any) -> Any:
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


def test_a_collapsed_student_has_both_modes_again_after_one_exact_step():
    """Data 0.3 N(-2, 0.2^2) + 0.7 N(2, 0.2^2) on the flow path. The student says +2 at pure noise, and the nearer mode
    at any state below it. The teacher's exact step to t = 0.75 keeps the order of states, so that it maps a quantile to
    the same quantile there; by then the sign is the teacher's in the share that quadrature gives."""
    weights, means, deviation, t = np.array([0.3, 0.7]), np.array([-2.0, 2.0]), 0.2, 0.75
    spread = math.hypot((1 - t) * deviation, t)
    grid = np.linspace(-6, 6, 20001)
    density = (weights * np.exp(-0.5 * ((grid[:, None] - (1 - t) * means) / spread) ** 2)).sum(1)
    share = float(density[grid > 0].sum() / density.sum())
    cumulated = (weights * normal((grid[:, None] - (1 - t) * means) / spread)).sum(1)
    start = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))

    def exact(x: torch.Tensor) -> torch.Tensor:
        moved = np.interp(normal(x.numpy()), cumulated, grid)
        return (x - torch.tensor(moved, dtype=torch.float32)) / (1 - t)

    def collapsed(x: torch.Tensor, time: float) -> torch.Tensor:
        mode = torch.full_like(x, 2.0) if time == 1 else 2 * x.sign()
        return (x - mode) / time

    def share_drawn(calls: int) -> float:
        scheduler = travelling_module("given_steps").GivenStepsScheduler(
            steps=[1000.0, 750.0], alphas=[0.0, 0.25], sigmas=[1.0, 0.75], plain=calls, renoise=True,
            prediction_type="flow_prediction",
        )  # fmt: skip
        x = start
        for call, timestep in enumerate(scheduler.timesteps):
            output = exact(x) if call < calls else collapsed(x, float(timestep) / 1000)
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        assert torch.allclose(x.abs(), torch.tensor(2.0), atol=1e-4)
        return float((x > 0).float().mean())

    assert abs(share_drawn(1) - share) < 3 * math.sqrt(share * (1 - share) / 20000)
    assert share_drawn(0) > share + 0.15  # fresh noise around +2 at t = 0.75 seldom changes its sign


def test_what_cannot_be_one_pipeline_is_said_in_one_line(teacher_of, tmp_path):
    teacher = teacher_of("sd")
    exported(teacher, "sd", tmp_path / "student")

    def asked(match: str, **more: Any) -> None:
        with pytest.raises(UserError, match=match):
            write_hybrid(
                teacher, "tiny", tmp_path / "student", tmp_path / "h", **{"guidance": 2.0, "calls": 1, **more}
            )

    asked("--teacher-calls is 5, and this student draws in 4: give 0 to 4", calls=5)
    with pytest.raises(UserError, match="give the student's own teacher"):
        write_hybrid(teacher_of("sd3"), "sd3", tmp_path / "student", tmp_path / "h", guidance=2.0, calls=1)
    assert not (tmp_path / "h").exists()
