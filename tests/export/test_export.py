"""A student's folder draws in plain diffusers what the student drew, and says so when anything in it was altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from student_toy import SAMPLERS, assert_same, drawn, kept
from tiny import EMBEDDED, MORE_FLOW, PIPELINES, SIZES, call_of, shaken, tiny_prompts

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.card import STOCK
from stepdistill.export.schedulers import on_stock_grid, stock_scheduler
from stepdistill.export.student_folder import VERIFICATION, export, student_pipeline
from stepdistill.export.verify import verify
from stepdistill.families.watching import frames_of
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.networks.lora import merged_state
from stepdistill.networks.pictures import draw_as_pipeline, strip
from stepdistill.networks.pipeline_files import absent_components
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.switched import networks_in
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.files import sha256_of
from stepdistill.system.travelling import is_own_code, travelling_code

Teachers = Callable[[str], PipelineTeacher]

CLASSES = {
    "unet-ddpm": "DDPMPipeline",
    "unet-ddim": "DDPMPipeline",
    "unet-classes": "ConsistencyModelPipeline",
    "dit": "DiTPipeline",
    "sd": "StableDiffusionPipeline",
    "sd-v": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "schnell": "FluxPipeline",
    "wan": "WanPipeline",
    "pixart-alpha": "PixArtAlphaPipeline",
    "pixart-sigma": "PixArtSigmaPipeline",
    "aura-flow": "AuraFlowPipeline",
    "qwen-image": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
    "sana": "SanaPipeline",
    "klein": "Flux2KleinPipeline",
    "ltx": "LTXPipeline",
    "hunyuan-video": "HunyuanVideoPipeline",
    "cog-video-x": "CogVideoXPipeline",
    "cog-video-x-1.5": "CogVideoXPipeline",
    "wan-2.2": "WanPipeline",
    "cogview4": "CogView4Pipeline",
    "lumina2": "Lumina2Pipeline",
    "hunyuan-dit": "HunyuanDiTPipeline",
    "chroma": "ChromaPipeline",
    "sana-sprint": "SanaSprintPipeline",
    "sd3.5": "StableDiffusion3Pipeline",
    "flux-2": "Flux2Pipeline",
    "kandinsky5": "Kandinsky5T2VPipeline",
    "text-to-video": "TextToVideoSDPipeline",
}
OWN_GRID = {"cogview4": ["flow_consistency"]}
"""Whose scheduler travels, as no stock one has their grid."""

IN_A_FRESH_PROCESS = (
    pytest.param("unet-classes", marks=pytest.mark.own_process),
    "dit",
    "sd",
    "sd3",
    "flux",
    "wan-2.2",
    "sana-sprint",
    "klein",
    "cog-video-x-1.5",
    "cogview4",
)


class Exported:
    """A perturbed student and the folder it was exported to."""

    def __init__(self, name: str, teacher: PipelineTeacher, folder: Path, lora_rank: int = 0) -> None:
        self.name, self.teacher, self.folder = name, teacher, folder
        passes, scheduler = teacher.family.passes, teacher.pipe.scheduler
        self.sampler = on_stock_grid(SAMPLERS[name], teacher.path, scheduler, passes=passes)
        self.prompts, self.seeds = tiny_prompts(name, 2), (0, 1)
        roles = Adapters(teacher, lora_rank, 3.0 * lora_rank) if lora_rank else Copies(teacher)
        self.student = roles.student
        shaken(torch.nn.ParameterList(roles.parameters("student")), amount=1.0 if lora_rank else 0.2)
        export(self.student, self.sampler, teacher, folder, self.prompts, "# A card\n", seeds=self.seeds)

    @property
    def weights(self) -> Path:
        """The denoiser's weights."""
        return self.folder / self.teacher.family.network / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def exported(teacher_of: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """exported(name): the student of a tiny teacher, exported once."""
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            done[name] = Exported(name, teacher_of(name), tmp_path_factory.mktemp(name) / "student")
        return done[name]

    return get


def loaded(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=bool(travelling_code(folder)),
        **absent_components(folder),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_diffusers_draws_what_the_student_drew(name: str, exported: Callable[[str], Exported]) -> None:
    run = exported(name)
    pipe = loaded(run.folder)
    assert type(pipe).__name__ == CLASSES[name]
    networks = [getattr(pipe, part) for part in run.teacher.family.stretches(pipe)]
    originals = networks_in(run.teacher.denoiser.net)
    for net, wanted, before in zip(networks, networks_in(run.student.net), originals, strict=True):
        state, own, original = (each.state_dict() for each in (net, wanted, before))
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
        assert not all(torch.equal(state[key], original[key]) for key in own)
    assert_same(drawn(pipe, run.folder), kept(run.folder))
    # The teacher's own pipeline was left alone.
    assert run.teacher.pipe.scheduler is not pipe.scheduler
    assert getattr(run.teacher.pipe, run.teacher.family.network) is originals[0]
    index = json.loads((run.folder / "model_index.json").read_text())
    assert all(
        entry[0] in ("diffusers", "transformers", None, *OWN_GRID.get(name, ()))
        for entry in index.values()
        if isinstance(entry, list)
    )
    assert [file.stem for file in run.folder.rglob("*.py")] == OWN_GRID.get(name, []) and not list(
        run.folder.rglob("*.bin")
    )
    assert (run.folder / "README.md").read_text() == "# A card\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_FRESH_PROCESS)
def test_verify_passes_in_a_process_without_stepdistill(
    name: str, exported: Callable[[str], Exported]
) -> None:
    run = exported(name)
    found = verify(run.folder)
    assert found.images == 2 and found.steps == run.sampler.steps
    assert found.worst <= 1 and found.mean < 0.05
    assert str(found).startswith(f"verified: {found.files} files unaltered; 2 pictures")


@pytest.mark.parametrize("name", ["unet-classes", "dit", "sd", "sd3", "flux", "wan"])
def test_saved_and_loaded_twice_it_is_the_same(
    name: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    run = exported(name)
    loaded(run.folder).save_pretrained(tmp_path / "again")
    pipe = loaded(tmp_path / "again")
    assert type(pipe).__name__ == CLASSES[name]
    for component in ("model_index.json", "scheduler/scheduler_config.json"):
        first, second = (
            json.loads((folder / component).read_text()) for folder in (run.folder, tmp_path / "again")
        )
        assert {k: v for k, v in first.items() if k[0] != "_"} == {
            k: v for k, v in second.items() if k[0] != "_"
        }
    again = load_file(tmp_path / "again" / run.weights.relative_to(run.folder))
    own = run.student.net.state_dict()
    assert all(torch.equal(again[key], own[key]) for key in own)
    assert_same(drawn(pipe, run.folder), kept(run.folder))


def test_exporting_again_replaces_the_folder_and_leaves_no_other(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    run = exported("unet-ddpm")
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old.txt").write_text("from before")
    export(run.student, run.sampler, run.teacher, folder, run.prompts, "# New\n", seeds=run.seeds)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert not (folder / "old.txt").exists()
    assert torch.equal(kept(folder), kept(run.folder))


def test_a_failed_export_leaves_the_earlier_one(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    run = exported("unet-classes")
    folder = tmp_path / "student"
    shutil.copytree(run.folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is not a class"):
        export(run.student, run.sampler, run.teacher, folder, ["1", "10"], "# Bad\n", seeds=(0, 1))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_dit_labels_may_be_names(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    run = exported("dit")
    export(run.student, run.sampler, run.teacher, tmp_path / "s", ["tench", "goldfish"], "", seeds=run.seeds)
    assert torch.equal(kept(tmp_path / "s"), kept(run.folder))
    assert_same(drawn(loaded(tmp_path / "s"), tmp_path / "s"), kept(run.folder))


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_a_flow_student_of_fresh_noise_draws_one_picture_from_a_seed(
    name: str, teacher_of: Teachers, tmp_path: Path
) -> None:
    """These pipelines hand their generator to no scheduler: the one that travels has its noise from the start, which
    Flux's has packed."""
    teacher, folder, prompts = teacher_of(name), tmp_path / "student", tiny_prompts(name, 2)
    student = Student.from_teacher(teacher)
    shaken(student.net)
    times = tuple(teacher.path.shifted(time) for time in uniform_times(4))
    sampler = on_stock_grid(Sampler(times, True, grid=50), teacher.path, teacher.pipe.scheduler)
    card = f'DiffusionPipeline.from_pretrained("path/to/this/folder")\n{STOCK}\n'
    export(student, sampler, teacher, folder, prompts, card, seeds=(0, 1))
    assert is_own_code(folder / "scheduler" / "flow_consistency.py")
    assert "fresh noise between its steps" in (folder / "README.md").read_text()
    pipe, _ = load_pipeline(folder, "cpu")
    assert type(pipe.scheduler).__name__ == "FlowConsistencyScheduler"
    whole = drawn(pipe, folder)
    assert_same(whole, kept(folder))
    torch.manual_seed(7)  # whatever the global generator holds
    for i, prompt in enumerate(prompts):
        call = {**call_of(name, [prompt], 0.0), "num_inference_steps": 4, "output_type": "np"}
        image = pipe(**call, generator=torch.Generator().manual_seed(i), return_dict=False)[0]
        alone = strip(frames_of(image * 255)).round().to(torch.uint8)
        assert (alone.int() - whole[i].int()).abs().max() <= 1
    # Fresh noise matters, and the student can be saved again and can teach.
    euler = replace(sampler, renoise=False)
    other = draw_as_pipeline(student, euler, teacher.codec, prompts, (0, 1))
    assert (other - draw_as_pipeline(student, sampler, teacher.codec, prompts, (0, 1))).abs().max() > 0.02
    pipe.save_pretrained(tmp_path / "again")
    again, _ = load_pipeline(tmp_path / "again", "cpu")
    assert_same(drawn(again, folder), whole)
    path = PipelineTeacher(again, size=teacher.size).path
    assert isinstance(path, FlowPath) and path.shift == pytest.approx(teacher.path.shift, abs=1e-4)


def test_verify_draws_a_flow_student_of_fresh_noise(teacher_of: Teachers, tmp_path: Path) -> None:
    teacher, folder = teacher_of("sd3"), tmp_path / "student"
    student = Student.from_teacher(teacher)
    shaken(student.net)
    export(student, Sampler((1.0, 0.5), True), teacher, folder, tiny_prompts("sd3", 2), "", seeds=(0, 1))
    assert verify(folder).worst <= 1


def test_fresh_noise_is_refused_where_the_pipeline_keeps_its_generator(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    run = exported("dit")
    with pytest.raises(UserError, match="could not be reproduced from a seed: DiTPipeline"):
        export(
            run.student, Sampler((1.0, 0.5), True), run.teacher, tmp_path / "s", run.prompts, "", seeds=(0, 1)
        )
    assert not list(tmp_path.iterdir())
    student_pipeline(run.student, Sampler((1.0,), True), run.teacher)  # one step draws no second noise


@pytest.mark.parametrize("name", ["unet-classes", "sd", "sd3", "flux", "wan"])
def test_a_student_can_teach(name: str, exported: Callable[[str], Exported]) -> None:
    run = exported(name)
    teacher = PipelineTeacher(load_teacher(str(run.folder)), size=SIZES.get(name))
    x_t, t = (
        torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.9, 0.2]),
    )
    with torch.no_grad():
        said, wanted = (
            who.predict(x_t, t, teacher.codec.encode(run.prompts)) for who in (teacher, run.student)
        )
    assert (said.x0 - wanted.x0).abs().max() < 1e-4
    assert torch.equal(teacher.path.angle(t), run.student.path.angle(t))


# --- what verify refuses -----------------------------------------------------------------------------------------


@pytest.fixture
def copied(exported: Callable[[str], Exported], tmp_path: Path) -> Path:
    """A copy of the class-conditional student's folder, to be damaged."""
    shutil.copytree(exported("unet-classes").folder, tmp_path / "student")
    return tmp_path / "student"


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def rejected(folder: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found(copied: Path) -> None:
    content = bytearray((copied / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (copied / WEIGHTS).write_bytes(content)
    rejected(copied, f"{WEIGHTS} was altered since export")


def test_an_edited_scheduler_is_found(copied: Path) -> None:
    file = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "original_inference_steps": 50}, indent=2))
    rejected(copied, "scheduler/scheduler_config.json was altered since export")


def test_a_missing_file_is_found(copied: Path) -> None:
    (copied / WEIGHTS).unlink()
    rejected(copied, f"{WEIGHTS} is missing since export")


def test_a_missing_or_broken_manifest_is_found(copied: Path) -> None:
    manifest = copied / VERIFICATION / "manifest.json"
    manifest.write_text("{")
    rejected(copied, "manifest.json cannot be read")
    manifest.write_text("{}")
    rejected(copied, "manifest.json cannot be read")
    manifest.unlink()
    rejected(copied, "is not a student folder")


def test_an_altered_picture_is_found(copied: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(copied / VERIFICATION / "0.png")
    rejected(copied, f"{VERIFICATION}/0.png was altered since export")


def forge(folder: Path, name: str) -> None:
    """Writes a file's present hash into the manifest."""
    manifest = folder / VERIFICATION / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = sha256_of(folder / name)
    manifest.write_text(json.dumps(content))


def test_other_weights_under_a_forged_hash_draw_other_pictures(copied: Path) -> None:
    state = load_file(copied / WEIGHTS)
    state["conv_out.weight"] = 1.5 * state["conv_out.weight"]
    save_file(state, copied / WEIGHTS, metadata={"format": "pt"})
    forge(copied, WEIGHTS)
    rejected(copied, "pictures differ from the trainer's by .*/255 at most")


def test_a_folder_that_does_not_load_is_told_why(copied: Path) -> None:
    config = json.loads((copied / "model_index.json").read_text())
    config["unet"] = ["stepdistill.networks.student", "Student"]
    (copied / "model_index.json").write_text(json.dumps(config))
    forge(copied, "model_index.json")
    rejected(copied, "does not draw in a process without stepdistill: .*stepdistill")


# --- LoRA and embedded guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "schnell", "wan", *sorted({*MORE_FLOW, "cog-video-x-1.5"} - {*EMBEDDED})]
)
def test_the_adapter_alone_makes_the_teacher_the_student(
    name: str, teacher_of: Teachers, tmp_path: Path
) -> None:
    from tiny import tiny_pipeline

    teacher = teacher_of(name)
    run = Exported(name, teacher, tmp_path / "student", lora_rank=2)
    merged = merged_state(run.student.net, "student")
    saved = load_file(run.weights)
    assert all(torch.equal(saved[key], merged[key]) for key in merged)
    original = teacher.denoiser.net.state_dict()
    assert sum(not torch.equal(merged[key], original[key]) for key in merged) > 10
    assert_same(drawn(loaded(run.folder), run.folder), kept(run.folder))

    pipe = tiny_pipeline(name)
    pipe.load_lora_weights(run.folder, weight_name="pytorch_lora_weights.safetensors")
    passes, scheduler = teacher.family.passes, teacher.pipe.scheduler
    pipe.scheduler = stock_scheduler(run.sampler, run.student.path, scheduler, passes)
    x_t = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    t, cond = torch.tensor([1.0, 0.3]), teacher.codec.encode(run.prompts)
    time = teacher.family.time(teacher.path, t)
    with torch.no_grad():
        by_adapter = teacher.family.call(getattr(pipe, teacher.family.network), x_t, time, cond)
        plain = student_pipeline(run.student, run.sampler, teacher)
        by_merging = teacher.family.call(getattr(plain, teacher.family.network), x_t, time, cond)
    assert (by_adapter - by_merging).abs().max() < 1e-4
    assert (by_merging - teacher.denoiser.raw(x_t, t, cond)).abs().max() > 1e-2
    assert_same(drawn(pipe, run.folder), kept(run.folder))


@pytest.mark.parametrize("name", ["unet-classes", "dit", "pixart-sigma", "hunyuan-dit"])
def test_a_lora_student_of_a_pipeline_without_adapters_is_merged(
    name: str, teacher_of: Teachers, tmp_path: Path
) -> None:
    run = Exported(name, teacher_of(name), tmp_path / "student", lora_rank=2)
    assert not (run.folder / "pytorch_lora_weights.safetensors").exists()
    assert_same(drawn(loaded(run.folder), run.folder), kept(run.folder))


def test_a_student_of_embedded_guidance_is_given_its_scale(teacher_of: Teachers, tmp_path: Path) -> None:
    from stepdistill.methods.lcm import LCM

    teacher = teacher_of("sd")
    student = Student.from_teacher(teacher)
    method = LCM(Copies(teacher, student), (1.0, 0.5), LCM.Options(guidance=5.5, guidance_range=(2.0, 8.0)))
    shaken(student.net)
    torch.nn.init.normal_(student.net.get_parameter("time_embedding.cond_proj.weight"), std=0.3)
    sampler = on_stock_grid(method.sampler(), teacher.path, teacher.pipe.scheduler)
    folder, prompts = tmp_path / "student", tiny_prompts("sd", 2)
    export(student, sampler, teacher, folder, prompts, "", seeds=(0, 1))
    manifest = json.loads((folder / VERIFICATION / "manifest.json").read_text())
    assert manifest["call"]["guidance_scale"] == 5.5
    assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256
    assert verify(folder).worst <= 1
    # The scale matters: another one draws another picture.
    pictures = draw_as_pipeline(student, sampler, teacher.codec, prompts, (0, 1))
    other = Sampler(sampler.times, sampler.renoise, sampler.grid, guidance=2.0)
    assert (draw_as_pipeline(student, other, teacher.codec, prompts, (0, 1)) - pictures).abs().max() > 0.02
