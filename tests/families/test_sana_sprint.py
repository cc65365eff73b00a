"""SANA-Sprint: a network of the straight path that is called on TrigFlow's, with guidance as an input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from tiny import SIZES, tiny_pipeline, tiny_prompts

from stepdistill.diffusion.path import FlowPath, TrigPath
from stepdistill.errors import UserError
from stepdistill.export.checks import teacher_check
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.families.condition import GUIDANCE
from stepdistill.families.watching import watch
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

NAME = "sana-sprint"
Teachers = Callable[[str], PipelineTeacher]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_network_is_called_as_its_pipeline_calls_it(steps: int, teacher_of: Teachers) -> None:
    """Bit for bit: its input, time, conditions and scale, in each of its steps, from the noise on; and its picture."""
    teacher = teacher_of(NAME)
    family, size, prompts = teacher.family, SIZES[NAME], tiny_prompts(NAME, 2)
    call = {
        **family.call_arguments("SanaSprintPipeline", prompts, 4.5, size),
        **family.grid_arguments(steps),
        **{"num_inference_steps": steps, "output_type": "np"},
        "generator": [torch.Generator().manual_seed(seed) for seed in (7, 8)],
    }
    seen, cond = watch(teacher.pipe, call), teacher.codec.encode(prompts)
    scales = cond.with_tensor(GUIDANCE, torch.full((2,), 4.5))
    angles = {1: [math.pi / 2], 2: [math.pi / 2, 1.3], 4: [k * math.pi / 8 for k in (4, 3, 2, 1)]}[steps]
    assert [step.timestep for step in seen.steps] == pytest.approx(angles, abs=1e-5)
    noise = torch.cat([torch.randn(1, *teacher.codec.shape, generator=_seeded(seed)) for seed in (7, 8)])
    assert torch.equal(seen.steps[0].sample, family.pack(noise))
    for step in seen.steps:
        t = torch.full((2,), step.timestep / (math.pi / 2))
        said = teacher.denoiser.raw(family.unpack(step.sample, teacher.codec.shape), t, scales)
        assert (family.pack(said) - step.output).abs().max() < 1e-6
    other = teacher.denoiser.raw(noise, t, cond.with_tensor(GUIDANCE, torch.full((2,), 1.0)))
    assert (other - teacher.denoiser.raw(noise, t, scales)).abs().max() > 1e-2
    assert teacher_check(teacher, prompts[0], steps) == 0.0


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_its_network_is_one_of_the_straight_path(teacher_of: Teachers) -> None:
    """At the time and state of a flow with the same noise, what it says of x0 and eps is what its raw output is there:
    a velocity."""
    teacher = teacher_of(NAME)
    net, flow, trig = teacher.denoiser.net, FlowPath(), TrigPath()
    x0, eps = torch.randn(2, 3, *teacher.codec.shape, generator=_seeded(0)).unbind()
    t = torch.tensor([0.9, 0.5, 0.1])
    cond = teacher.codec.encode(tiny_prompts(NAME, 3))
    said = teacher.predict(trig.noised(x0, eps, t), t, cond)
    u = flow.time_of(trig.angle(t))
    x_u = flow.noised(x0, eps, u)
    with torch.no_grad():
        velocity = net(
            x_u,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            guidance=torch.full((3,), 0.1),
            timestep=u,
            return_dict=False,
        )[0]
    read = flow.read(velocity, "velocity", x_u, u)
    assert (said.x0 - read.x0).abs().max() < 1e-4 and (said.eps - read.eps).abs().max() < 1e-4


def test_a_student_is_deaf_to_the_scale_and_stays_so(teacher_of: Teachers) -> None:
    teacher = teacher_of(NAME)
    student, cond = Student.from_teacher(teacher), teacher.codec.encode(tiny_prompts(NAME, 2))
    x, t = torch.randn(2, *teacher.codec.shape, generator=_seeded(1)), torch.tensor([1.0, 0.4])
    optimizer = torch.optim.SGD(student.net.parameters(), 0.1)
    assert torch.allclose(student.raw(x, t, cond), teacher.denoiser.raw(x, t, cond), rtol=1e-5, atol=1e-4)
    student.raw(x, t, cond).square().mean().backward()
    optimizer.step()
    louder = cond.with_tensor(GUIDANCE, torch.full((2,), 7.0))
    assert torch.equal(student.raw(x, t, louder), student.raw(x, t, cond))
    assert (student.raw(x, t, cond) - teacher.denoiser.raw(x, t, cond)).abs().max() > 1e-3


def test_steps_that_its_scheduler_has_not_are_refused(teacher_of: Teachers) -> None:
    """It takes fresh noise between steps, which are even, but for the second of two."""
    teacher = teacher_of(NAME)
    path, own = teacher.path, teacher.pipe.scheduler
    for times in ((1.0,), (1.0, 1.3 / (math.pi / 2)), (1.0, 0.75, 0.5, 0.25)):
        assert on_stock_grid(Sampler(times, True), path, own).times == pytest.approx(times, abs=1e-5)
    with pytest.raises(UserError, match=r"nearest is \[1.0, 0.8276\]"):
        stock_scheduler(Sampler((1.0, 0.5), True), path, own)
    with pytest.raises(UserError, match="2 steps without fresh noise"):
        stock_scheduler(Sampler((1.0, 0.8276), False), path, own)
    pipe = tiny_pipeline(NAME)
    pipe.scheduler.register_to_config(sigma_data=1.0)
    with pytest.raises(UserError, match=r"sigma_data 1, and a SanaSprintPipeline draws with 0\.5"):
        PipelineTeacher(pipe, size=SIZES[NAME])


@pytest.mark.parametrize("rank", [0, 2])
def test_four_steps_of_scm_and_of_lcm_are_proven(rank: int, tmp_path: Path) -> None:
    method = "lcm" if rank else "scm"
    (tmp_path / "prompts.txt").write_text("a red heart\nblue fish\n")
    sets = [
        *(f"student.lora_rank={rank}", "train.lr=1e-2", "train.batch=1", "train.preview_every=0"),
        *("train.updates=2", "train.average=0", "evaluate=false", "student.times=[1.0,0.75,0.5,0.25]"),
        *("options.pairs=2", "options.pair_steps=2", "options.guidance=4.5", "data.size=[32, 64]"),
        f"data.prompts={tmp_path / 'prompts.txt'}",
    ]
    recipe = load_recipe(HERE / "empty.yaml", method=method, teacher=NAME, sets=sets)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator, tiny_pipeline(NAME))
    train(job.objective, training_data(job, tmp_path), recipe, tmp_path, accelerator)
    folder = tmp_path / "student"
    export(job.student, job.sampler, job.teacher, folder, tiny_prompts(NAME, 1), "", seeds=(0,))
    found = verify(folder)
    assert found.steps == 4 and found.worst <= 1
    call = json.loads((folder / "verification" / "manifest.json").read_text())["call"]
    assert call["intermediate_timesteps"] is None and call["guidance_scale"] == 0
