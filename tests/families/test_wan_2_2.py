"""Wan 2.2 A14B: a teacher of two networks, and its students, which are Wan pipelines again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from safetensors.torch import load_file
from tiny import SIZES, call_of, tiny_pipeline, tiny_prompts
from torch import Tensor

from stepdistill.diffusion.solvers import solve
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import check_export, export, student_pipeline
from stepdistill.export.verify import verify
from stepdistill.families.watching import frames_of, watch
from stepdistill.methods.phased_dmd import PhasedDMD
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.switched import SwitchedNetworks
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.checkpoint import load_checkpoint
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

NAME, SIZE = "wan-2.2", SIZES["wan-2.2"]
FOUR = (1.0, 0.954545, 0.875, 0.7)  # of the teacher's shift; it changes its network at 0.9
Teachers = Callable[[str], PipelineTeacher]


def networks_called(pipe: Any, call: dict[str, Any]) -> list[str]:
    """The networks that the steps of a draw call, in order."""
    return [step.calls[-1].network for step in watch(pipe, {**call, "output_type": "np"}).steps]


def test_each_network_is_called_and_guided_in_its_own_stretch() -> None:
    """The pipeline's picture with two scales is the teacher's with two, and not that with one."""
    pipe = tiny_pipeline(NAME)
    teacher = PipelineTeacher(pipe, size=SIZE, guidance=4.0, guidance_2=2.5)
    call = {**call_of(NAME, ["a red heart"], 4.0), "guidance_scale_2": 2.5, "num_inference_steps": 8}
    generator = torch.Generator().manual_seed(3)
    drawn = frames_of(pipe(**call, generator=generator, output_type="np", return_dict=False)[0])
    noise = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    cond, times = teacher.codec.encode(["a red heart"]), pipe.scheduler.sigmas.tolist()

    def apart() -> float:
        states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=4.0), noise, times, "euler")
        return float((teacher.codec.to_frames(states) - drawn).abs().max())

    assert apart() < 1e-4
    teacher.guidance_2 = None
    assert apart() > 1e-3


def test_the_second_scale_stands_for_the_recipes_alone() -> None:
    """0, 1 and scores' own scales are themselves in both stretches, one by one and within a batch."""
    teacher = PipelineTeacher(tiny_pipeline(NAME), size=SIZE, guidance=4.0)
    x, cond = torch.randn(4, *teacher.codec.shape), teacher.codec.encode(tiny_prompts(NAME, 4))
    stretches = {"first": torch.full((4,), 0.95), "second": torch.full((4,), 0.3)}
    scales = (0.0, 1.0, 2.5, 4.0, 6.0)

    def said(scale: float | Tensor, t: Tensor) -> Tensor:
        return teacher.predict(x, t, cond, guidance=scale).x0

    plain = {name: {scale: said(scale, t) for scale in scales} for name, t in stretches.items()}
    teacher.guidance_2 = 2.5
    for name, t in stretches.items():
        for scale in scales:
            meant = 2.5 if (name, scale) == ("second", 4.0) else scale
            torch.testing.assert_close(said(scale, t), plain[name][meant])
    # A score's guidance that is on below t = 0.5 alone is 1 above, where the first network is, and here too.
    mixed = said(torch.tensor([0.0, 1.0, 4.0, 6.0]), stretches["second"])
    for row, meant in enumerate((0.0, 1.0, 2.5, 6.0)):
        torch.testing.assert_close(mixed[row], plain["second"][meant][row])


def test_a_second_scale_beside_none_is_refused_and_an_interval_of_its_stretch_says_it() -> None:
    """The first network's stretch ends at boundary_ratio: with that interval, guided there and plain above."""
    pipe = tiny_pipeline(NAME)
    refused = (
        r"guidance is 1 and options.guidance_2 2.5, .* set options.guidance=2.5 and options.guidance_interval"
    )
    with pytest.raises(UserError, match=refused):
        PipelineTeacher(pipe, size=SIZE, guidance=1.0, guidance_2=2.5)
    assert pipe.config.boundary_ratio == 0.9
    teacher = PipelineTeacher(pipe, size=SIZE, guidance=2.5, guidance_interval=(0.0, 0.9))
    x, cond = torch.randn(2, *teacher.codec.shape), teacher.codec.encode(tiny_prompts(NAME, 2))
    above, below = torch.full((2,), 0.95), torch.full((2,), 0.3)
    guided = teacher.predict(x, above, cond, guidance=2.5).x0
    torch.testing.assert_close(guided, teacher.predict(x, above, cond).x0)
    apart = teacher.predict(x, below, cond, guidance=2.5).x0 - teacher.predict(x, below, cond).x0
    assert float(apart.abs().max()) > 1e-3


def test_at_the_bound_it_is_the_first_network_as_in_the_pipeline(teacher_of: Teachers) -> None:
    teacher = teacher_of(NAME)
    net = teacher.denoiser.net
    assert isinstance(net, SwitchedNetworks)
    below = float(torch.nextafter(torch.tensor(0.9), torch.tensor(0.0)) - 1e-6)
    x, cond = torch.randn(4, *teacher.codec.shape), teacher.codec.encode(tiny_prompts(NAME, 4))
    t = torch.tensor([0.9, below, 1.0, 0.2])
    mixed = teacher.denoiser.raw(x, t, cond)
    for row, which in enumerate((0, 1, 0, 1)):
        one = Student(net.networks[which], teacher.path, "velocity", teacher.family, teacher.codec.shape)
        alone = one.raw(x[row : row + 1], t[row : row + 1], cond.rows(slice(row, row + 1)))
        assert (mixed[row] - alone[0]).abs().max() < 1e-5
    # Features are those of the network that is called.
    features = teacher.denoiser.features(x, t, cond)
    assert features.shape[1:] == one.features(x, t, cond).shape[1:]
    assert torch.allclose(features[[1, 3]], one.features(x, t, cond)[[1, 3]], atol=1e-5)
    assert not torch.allclose(features[0], one.features(x, t, cond)[0], atol=1e-3)


def test_an_expert_of_a_phase_starts_as_the_teachers_network_of_that_phase(teacher_of: Teachers) -> None:
    teacher = teacher_of(NAME)
    both = teacher.denoiser.net
    assert isinstance(both, SwitchedNetworks)
    method = PhasedDMD(Copies(teacher), FOUR, PhasedDMD.Options())
    for expert, start in zip(method.student.experts, both.networks, strict=True):
        own, wanted = expert.net.state_dict(), start.state_dict()
        assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in own)
    assert isinstance(method.fake.net, SwitchedNetworks)  # it follows at all noise
    assert method.student.bounds == pytest.approx([0.9148], abs=1e-4)
    # A call leads down from its time: of a phase that begins where the teacher changes, it is the second.
    last = PhasedDMD(Copies(teacher), (1.0, 0.95, 0.9, 0.7), PhasedDMD.Options()).student.experts[1]
    assert torch.equal(next(last.net.parameters()), next(both.networks[1].parameters()))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_phase_in_which_the_teacher_changes_its_network_is_refused(rank: int, teacher_of: Teachers) -> None:
    roles = Adapters(teacher_of(NAME), rank) if rank else Copies(teacher_of(NAME))
    with pytest.raises(UserError, match=r"at 0.7, 0.5, between which|at 1, 0.8, between which.*side of 0.9$"):
        PhasedDMD(roles, (1.0, 0.8, 0.7, 0.5), PhasedDMD.Options())


@dataclass
class Trained:
    """A run's parts after it, and its folder."""

    job: Assembled
    recipe: Any
    folder: Path

    def again(self, resume: bool = False) -> Trained:
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(self.recipe), accelerator, tiny_pipeline(NAME))
        self.folder.mkdir(exist_ok=True)
        train(
            job.objective,
            training_data(job, self.folder),
            self.recipe,
            self.folder,
            accelerator,
            resume=resume,
        )
        return Trained(job, self.recipe, self.folder)


def run_of(method: str, rank: int, folder: Path, *more: str) -> Trained:
    """A trained run of the tiny teacher."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red heart\nblue fish\n")
    sets = [
        *(f"student.lora_rank={rank}", "train.lr=1e-2", "train.batch=1", "train.preview_every=0"),
        *(
            "train.updates=4",
            "train.checkpoint_every=2",
            "train.average=0",
            "options.guidance=2",
            "evaluate=false",
        ),
        f"data.prompts={folder / 'prompts.txt'}",
        f"data.size={[SIZE.height, SIZE.width, SIZE.frames]}",
    ]
    recipe = load_recipe(HERE / "empty.yaml", method=method, teacher=NAME, sets=[*sets, *more])
    return Trained(None, recipe, folder).again()  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_phased_student_is_a_wan_pipeline_that_switches_where_its_phases_meet(
    rank: int, tmp_path: Path
) -> None:
    """Of stock classes alone, proven in a fresh process; the run resumes bit for bit; adapters load one by one."""
    phases = ("options.phase_updates=1", "options.fake_updates=1", "options.guidance_2=1.5")
    run = run_of("phased_dmd", rank, tmp_path / "run", *phases, "train.keep=5")
    job = run.job
    student = tmp_path / "student"
    export(job.student, job.sampler, job.teacher, student, tiny_prompts(NAME, 1), "", seeds=(0,))
    index = json.loads((student / "model_index.json").read_text())
    assert index["boundary_ratio"] == pytest.approx(0.9148, abs=1e-4)
    assert index["transformer_2"] == ["diffusers", "WanTransformer3DModel"] and not list(
        student.rglob("*.py")
    )
    found = verify(student)
    assert found.steps == 4 and found.worst <= 1
    pipe = load_teacher(str(student))
    call = json.loads((student / "verification" / "manifest.json").read_text())["call"]
    assert networks_called(pipe, call) == ["transformer"] * 2 + ["transformer_2"] * 2
    # It can teach: as two networks again.
    assert isinstance(PipelineTeacher(pipe, size=SIZE).denoiser.net, SwitchedNetworks)

    last = [load_checkpoint(tmp_path / "run" / "work" / "checkpoints" / "step-00000004")[0]]
    shutil.rmtree(tmp_path / "run" / "work" / "checkpoints" / "step-00000004")
    run.again(resume=True)
    last.append(load_checkpoint(tmp_path / "run" / "work" / "checkpoints" / "step-00000004")[0])
    assert last[0].keys() == last[1].keys()
    for part, tensors in last[0].items():
        assert all(torch.equal(value, last[1][part][key]) for key, value in tensors.items()), part

    if rank:
        teacher = tiny_pipeline(NAME)
        for k, more in ((1, {}), (2, {"load_into_transformer_2": True})):
            state = load_file(student / f"expert-{k}" / "pytorch_lora_weights.safetensors")
            assert state and all(key.startswith("transformer.blocks.") for key in state)
            teacher.load_lora_weights(student / f"expert-{k}", **more)
        teacher.register_to_config(boundary_ratio=index["boundary_ratio"])
        teacher.scheduler = pipe.scheduler
        drawn = [
            frames_of(
                each(**call, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[
                    0
                ]
            )
            for each in (teacher, pipe)
        ]
        assert (drawn[0] - drawn[1]).abs().max() < 1e-4


@pytest.mark.parametrize(("method", "rank"), [("dmd", 2), ("lcm", 0)])
def test_a_student_of_another_method_switches_as_its_teacher(method: str, rank: int, tmp_path: Path) -> None:
    quick = {
        "dmd": ("options.fake_updates=1", "options.fake_warm_start=0"),
        "lcm": ("options.pairs=2", "options.pair_steps=2", "options.grid=20"),
    }[method]
    job = run_of(method, rank, tmp_path / "run", *quick, f"student.times={list(FOUR)}").job
    check_export(job.student, job.sampler, job.teacher, "a red heart")
    pipe = student_pipeline(job.student, job.sampler, job.teacher)
    assert pipe.config.boundary_ratio == 0.9
    call = {**call_of(NAME, ["a red heart"], 0.0), "num_inference_steps": 4}
    assert networks_called(pipe, call) == ["transformer"] * 2 + ["transformer_2"] * 2


@pytest.mark.parametrize("rank", [0, 2])
def test_a_generator_of_one_step_is_one_network(rank: int, tmp_path: Path) -> None:
    quick = ("options.fake_updates=1", "options.fake_warm_start=0", "student.times=[1.0]", "train.updates=2")
    job = run_of("dmd", rank, tmp_path / "run", *quick).job
    assert isinstance(job.student.net, SwitchedNetworks) == bool(rank)  # adapters lie on both
    check_export(job.student, job.sampler, job.teacher, "a red heart")
    student = tmp_path / "student"
    export(job.student, job.sampler, job.teacher, student, tiny_prompts(NAME, 1), "", seeds=(0,))
    index = json.loads((student / "model_index.json").read_text())
    assert index["boundary_ratio"] is None and index["transformer_2"] == [None, None]
    files = [str(file.relative_to(student)) for file in student.rglob("pytorch_lora_weights.safetensors")]
    assert files == (["expert-1/pytorch_lora_weights.safetensors"] if rank else [])


def test_what_needs_one_network_is_refused(teacher_of: Teachers, tmp_path: Path) -> None:
    teacher = teacher_of(NAME)
    student = Student.from_teacher(teacher)
    for change in (student.add_guidance_input, lambda: student.make_slimmer(0.5, 1)):
        with pytest.raises(UserError, match="has 2 networks, each for its own noise"):
            change()
    with pytest.raises(
        UserError, match="sharded, but this teacher calls one of its networks for some samples"
    ):
        run_of("dmd", 0, tmp_path / "run", "train.parallel=sharded")
    with pytest.raises(UserError, match="guidance_2 is 3, but this teacher has one network"):
        PipelineTeacher(tiny_pipeline("wan"), size=SIZE, guidance_2=3.0)
    pipe = tiny_pipeline(NAME)
    pipe.register_modules(transformer_2=None)
    with pytest.raises(UserError, match="has no transformer_2, which it calls in a stretch"):
        PipelineTeacher(pipe, size=SIZE)
    # Without a bound the pipeline calls its first network alone, and so does the teacher.
    pipe = tiny_pipeline(NAME)
    pipe.register_to_config(boundary_ratio=None)
    assert PipelineTeacher(pipe, size=SIZE).denoiser.net is pipe.transformer


def test_more_phases_than_its_pipeline_switches_between_travel_as_one_network(teacher_of: Teachers) -> None:
    teacher = teacher_of(NAME)
    method = PhasedDMD(Copies(teacher), FOUR, PhasedDMD.Options(phases=4))
    sampler = on_stock_grid(method.sampler(), teacher.path, teacher.pipe.scheduler)
    pipe = student_pipeline(method.student, sampler, teacher)
    assert type(pipe.transformer).__name__ == "PhasedExperts" and pipe.transformer_2 is None
    assert isinstance(sampler, Sampler) and len(pipe.transformer.experts) == 4
