"""A teacher as it is taken: on its own path, with all its weights, its adapters merged, its pictures untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import flagging_checker, learned_variance, shaken, tiny_pipeline, tiny_prompts

from stepdistill.diffusion.path import FlowPath, TablePath
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.evaluation.drawing import cut_prompts
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.suite import load_suite
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export, student_pipeline
from stepdistill.export.verify import verify
from stepdistill.families import family_of
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.loading import (
    filters_of,
    load_folder,
    load_pipeline,
    load_teacher,
    taken_as,
    without_filters,
)
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.pictures import draw_as_pipeline, to_uint8
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.preflight import check_recipe

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


# --- the path ----------------------------------------------------------------------------------------------------


def flow(name: str, **more: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**{"use_flow_sigmas": True, "prediction_type": "flow_prediction", **more})


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver"])
def test_a_scheduler_in_flow_mode_is_on_the_path_on_which_it_reads_its_network(name: str) -> None:
    """What the scheduler makes of an output at each of its steps is what the path reads there."""
    scheduler = flow(f"{name}Scheduler", flow_shift=3.0)
    path, output = path_of(scheduler)
    assert isinstance(path, FlowPath)
    scheduler.set_timesteps(6)
    x, out = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unsqueeze(1)
    for i, sigma in enumerate(scheduler.sigmas[:-1]):
        scheduler._step_index = i
        t = sigma.reshape(1).float()
        x0 = scheduler.convert_model_output(out, sample=x)
        torch.testing.assert_close(x0.float(), path.read(out, output, x, t).x0, rtol=1e-5, atol=1e-5)
        assert float(scheduler.timesteps[i]) / 1000 == pytest.approx(float(sigma), abs=1e-3)


def test_flow_sigmas_count_with_every_kind_of_output_and_not_without_them() -> None:
    assert path_of(flow("DEISMultistepScheduler")) == (FlowPath(), "velocity")
    assert path_of(flow("UniPCMultistepScheduler", prediction_type="epsilon")) == (FlowPath(), "eps")
    plain = path_of(flow("UniPCMultistepScheduler", prediction_type="epsilon", use_flow_sigmas=False))
    assert isinstance(plain[0], TablePath) and plain[1] == "eps"
    with pytest.raises(UserError, match="flow_prediction without use_flow_sigmas"):
        path_of(flow("UniPCMultistepScheduler", use_flow_sigmas=False))


@pytest.mark.slow
def test_a_student_of_a_teacher_in_flow_mode_is_verified(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd3")
    pipe.register_modules(scheduler=flow("DPMSolverMultistepScheduler", flow_shift=3.0))
    teacher = PipelineTeacher(pipe)
    assert teacher.path == FlowPath(3.0)
    student = Student.from_teacher(teacher)
    sampler = on_stock_grid(Sampler(uniform_times(2), False), student.path, teacher.pipe.scheduler)
    export(student, sampler, teacher, tmp_path / "s", tiny_prompts("sd3", 2), "", seeds=(0, 1))
    assert verify(tmp_path / "s").worst <= 1


# --- the files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "teacher"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved pipeline, to be damaged."""
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "teacher"))


def lose(folder: Path, file: str, part: str) -> None:
    kept = {key: value for key, value in load_file(folder / file).items() if part not in key}
    save_file(kept, folder / file, metadata={"format": "pt"})


def refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "part", "says"),
    [
        (TEXT, "layers.1", r"weights of text_encoder lack \S*layers\.1\.\S+ and 15 more"),
        (UNET, "mid_block", r"weights of unet lack mid_block\.\S+ and \d+ more"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.conv_in.bias",
            r"vae lack decoder\.conv_in\.bias: get",
        ),
    ],
)
def test_weights_that_are_not_there_are_named_and_not_made_up(
    folder: Path, file: str, part: str, says: str
) -> None:
    lose(folder, file, part)
    refused(lambda: load_teacher(str(folder)), f"^teacher .*{says}")
    refused(lambda: load_pipeline(folder), says)


def test_a_pipeline_that_was_saved_with_its_lora_on_is_refused_as_that(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    add_adapter(pipe.unet)
    pipe.save_pretrained(tmp_path / "t")
    refused(lambda: load_teacher(str(tmp_path / "t")), "lack .*saved with its LoRA on; fuse and unload")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 492265168\n")


def page(file: Path) -> None:
    file.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        (TEXT, pointer, f"{TEXT} is a Git LFS pointer, .*git lfs pull in"),
        (UNET, pointer, f"{UNET} is a Git LFS pointer"),
        ("tokenizer/tokenizer.json", pointer, "tokenizer/tokenizer.json is a Git LFS pointer"),
        ("model_index.json", pointer, "model_index.json is a Git LFS pointer"),
        (TEXT, cut, f"{TEXT} is cut off or no safetensors file"),
        (UNET, page, f"{UNET} is cut off or no safetensors file"),
        ("model_index.json", page, r"model_index.json is not JSON \(Expecting value"),
        ("scheduler/scheduler_config.json", page, "scheduler_config.json is not JSON"),
        ("unet/config.json", page, "unet/config.json is not JSON"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_one_line(
    folder: Path, file: str, harm: Callable[[Path], None], says: str
) -> None:
    harm(next(folder.glob(file)))
    recipe = load_recipe(None, teacher=str(folder), method="dmd")
    refused(lambda: check_recipe(recipe), f"^teacher .*{says}")  # before torch is loaded
    refused(lambda: load_teacher(str(folder)), says)
    refused(lambda: load_pipeline(folder), says)


def test_shards_must_all_be_there(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "t", max_shard_size="20KB")
    teacher = PipelineTeacher(load_teacher(str(tmp_path / "t")))
    wanted = tiny_pipeline("sd").unet.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in teacher.denoiser.net.state_dict().items())
    shard = sorted((tmp_path / "t" / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    refused(lambda: load_teacher(str(tmp_path / "t")), f"names {shard.name}, which is not there")


def test_another_scheduler_is_refused_before_weights_are_read(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    content = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    config.write_text(json.dumps(content))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    lose(folder, UNET, "mid_block")  # would be told otherwise
    refused(lambda: load_teacher(str(folder)), "flow_prediction without use_flow_sigmas")


# --- adapters ----------------------------------------------------------------------------------------------------


def add_adapter(network: Any, name: str = "default", seed: int = 0) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "q_proj"], init_lora_weights=False),
            adapter_name=name,
        )


def plain(pipe: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    add_adapter(pipe.unet)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.text_encoder)


def scaled(pipe: Any) -> None:
    add_adapter(pipe.unet, "one", 1)
    add_adapter(pipe.unet, "two", 2)
    pipe.set_adapters(["one", "two"], [0.3, -1.5])


def one_of_two(pipe: Any) -> None:
    add_adapter(pipe.unet, "one", 1)
    add_adapter(pipe.unet, "two", 2)
    pipe.set_adapters(["one"])


def fused(pipe: Any) -> None:
    add_adapter(pipe.unet)
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)


def disabled(pipe: Any) -> None:
    add_adapter(pipe.unet)
    pipe.unet.disable_adapters()


@pytest.mark.parametrize("adapt", [plain, scaled, one_of_two, fused, disabled])
def test_a_teachers_adapters_are_in_its_weights(adapt: Callable[[Any], None]) -> None:
    """The teacher says what its pipeline says, and its student starts there, as an adapter, too; the pipeline itself
    is left as it was."""
    pipe = tiny_pipeline("sd")
    bare = PipelineTeacher(tiny_pipeline("sd"))
    adapt(pipe)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    teacher, prompts = PipelineTeacher(pipe), tiny_prompts("sd", 2)
    assert not lora_layers(teacher.denoiser.net) and not lora_layers(teacher.pipe.text_encoder)
    x = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.7, 0.2])
    family = family_of(pipe)
    with torch.no_grad():
        cond = family.encode(pipe, prompts, teacher.size)
        wanted = family.call(pipe.unet, x, family.time(teacher.path, t), cond)
        assert torch.allclose(teacher.codec.encode(prompts).tensors["encoder_hidden_states"],
                              cond.tensors["encoder_hidden_states"], atol=1e-5)  # fmt: skip
        torch.testing.assert_close(teacher.denoiser.raw(x, t, cond), wanted, rtol=0, atol=1e-5)
        for student in (Student.from_teacher(teacher), Adapters(teacher, 2).student):
            torch.testing.assert_close(student.raw(x, t, cond), wanted, rtol=0, atol=1e-5)
        apart = float((bare.denoiser.raw(x, t, bare.codec.encode(prompts)) - wanted).abs().max())
    assert apart == 0 if adapt is disabled else apart > 0.05
    assert pipe.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    pipeline = student_pipeline(student, Sampler((1.0,), True), teacher)
    assert not lora_layers(pipeline.unet) and not lora_layers(pipeline.text_encoder)
    if adapt is not disabled:
        assert taken_as(pipe)[0].startswith("Its adapters (")


# --- what alters pictures, and what networks return besides ------------------------------------------------------


def test_a_safety_checker_is_off_for_students_and_scores_and_the_papers_say_so(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    parts = {**tiny_pipeline("sd").components, **flagging_checker()}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=True)
    pipe.set_progress_bar_config(disable=True)
    blank = pipe("a red heart", num_inference_steps=2, output_type="np").images
    assert blank.max() == 0  # it does flag
    pipe.save_pretrained(tmp_path / "t")
    assert filters_of(pipe) == filters_of(tmp_path / "t") == ["safety checker"]
    assert taken_as(str(tmp_path / "t")) == [
        "The safety checker is off: it alters pictures after they are drawn."
    ]
    teachers = [PipelineTeacher(pipe), PipelineTeacher(load_teacher(str(tmp_path / "t")))]
    assert pipe.safety_checker is not None  # the object was left as it was
    student = Student.from_teacher(teachers[1])
    sampler = on_stock_grid(Sampler((1.0,), True), student.path, pipe.scheduler)
    prompts = tiny_prompts("sd", 2)
    export(student, sampler, teachers[1], tmp_path / "s", prompts, "", seeds=(0, 1))
    assert to_uint8(draw_as_pipeline(student, sampler, teachers[1].codec, prompts, (0, 1))).float().std() > 2
    index = json.loads((tmp_path / "s" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    # Scores: of the pictures, from object and folder alike, and under another key than black ones had.
    suite = load_suite("emoji-quick").derive(n=6)
    reports = [evaluate(given, suite, steps=1, progress=False) for given in (pipe, tmp_path / "t")]
    told = [[text for text in report.warnings if "safety checker" in text] for report in reports]
    assert all(len(lines) == 1 and "is off, as it alters pictures" in lines[0] for lines in told)
    assert reports[0].scores[1].fd == pytest.approx(reports[1].scores[1].fd, rel=1e-4)
    checked = weights_hash(tmp_path / "t")
    for file in (tmp_path / "t" / "safety_checker").iterdir():
        file.unlink()
    assert weights_hash(tmp_path / "t") == checked


class Mark:
    """As StableDiffusionXLWatermarker, which needs a package: changes every picture."""

    def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
        return images * 0


def test_a_watermarker_is_off_and_the_object_keeps_it() -> None:
    pipe = tiny_pipeline("sdxl")
    assert without_filters(pipe) is pipe
    pipe.watermark = Mark()
    assert taken_as(pipe) == ["The watermarker is off: it alters pictures after they are drawn."]
    taken = PipelineTeacher(pipe).pipe
    assert taken.watermark is None and isinstance(pipe.watermark, Mark)
    assert load_pipeline(pipe)[0].watermark is None and load_pipeline(pipe, filters=True)[0] is pipe


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_learned_variance_is_cut_off_exactly(lora_rank: int, tmp_path: Path) -> None:
    teacher = PipelineTeacher(learned_variance())
    roles = Adapters(teacher, lora_rank) if lora_rank else Copies(teacher)
    student = roles.student
    shaken(torch.nn.ParameterList(roles.parameters("student")))
    sampler = on_stock_grid(Sampler(uniform_times(2), True), student.path, teacher.pipe.scheduler)
    net = student_pipeline(student, sampler, teacher).unet
    assert (net.config.in_channels, net.config.out_channels) == (3, 3) and not lora_layers(net)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 3])
    with torch.no_grad(), student.adapter.on() if student.adapter else nullcontext():
        wanted = student.net(x, t).sample[:, :3]
        torch.testing.assert_close(net(x, t).sample, wanted, rtol=0, atol=0 if lora_rank == 0 else 1e-5)
    assert wanted.std() > 0.1 and teacher.denoiser.net.config.out_channels == 6
    if not lora_rank:
        export(student, sampler, teacher, tmp_path / "s", ["0", "1"], "", seeds=(0, 1))
        assert verify(tmp_path / "s").worst <= 1


def test_a_network_that_returns_fewer_channels_than_it_takes_is_refused() -> None:
    pipe = learned_variance()
    pipe.unet.register_to_config(out_channels=2)
    refused(lambda: PipelineTeacher(pipe), "takes 3 channels and returns 2")


def test_prompts_longer_than_the_tokenizer_reads_are_counted() -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.tokenizer_2.model_max_length = 6
    prompts = ["a red heart", " ".join(["heart"] * 40), "blue"]
    lines = cut_prompts(pipe, prompts)
    assert [line.split(" that")[0] for line in lines] == [
        "1 of 3 prompts have more than the 24 tokens",
        "1 of 3 prompts have more than the 6 tokens",
    ]
    assert cut_prompts(pipe, ["blue"]) == [] and cut_prompts(learned_variance(), prompts) == []


def test_a_pipeline_whose_libraries_are_not_installed_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    dummy = type("KolorsPipeline", (), {"_backends": ["torch", "sentencepieces"]})
    monkeypatch.setattr("diffusers.KolorsPipeline", dummy, raising=False)
    with pytest.raises(
        UserError, match=r"KolorsPipeline needs sentencepieces, .* pip install sentencepieces"
    ):
        load_folder(tmp_path, "teacher")
