"""A workflow for ComfyUI has documented nodes, and its sampler on its noise levels draws what the student does."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_prompts
from torch import Tensor

import stepdistill
from stepdistill.diffusion.path import FlowPath, Prediction, TablePath
from stepdistill.diffusion.path import Path as NoisePath
from stepdistill.errors import UserError
from stepdistill.export.adapters import KOHYA, check_options, save_adapters, save_comfyui
from stepdistill.export.comfyui import (
    COMFYUI,
    PUBLISHED,
    StudentFile,
    check_comfyui,
    check_workflow,
    sigmas_of,
    workflow,
)
from stepdistill.families.condition import Condition
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Adapters
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.sections import ExportOptions

TEACHERS = Path(stepdistill.__file__).parent / "planning" / "teachers"
TABLE = TablePath.from_alphas_cumprod(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
)
FOUR = Sampler((1.0, 0.75, 0.5, 0.25), False)


def made(pipeline: str, path: NoisePath, sampler: Sampler = FOUR, **more: Any) -> dict[str, Any]:
    given = {
        "student": StudentFile("pytorch_lora_weights_kohya.safetensors", 1.0),
        "teacher": "sdxl",
        "prompt": "a cat",
        "prediction_type": "epsilon",
        "width": 1024,
        "height": 768,
    }
    return workflow(pipeline=pipeline, sampler=sampler, path=path, **{**given, **more})


def named(nodes: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in nodes.values() if node["class_type"] == kind]


class Toy:
    """A network without weights: what it predicts depends on the state and the time."""

    def __init__(self, path: NoisePath) -> None:
        self.path = path

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t[:, None])

    def predict(self, x: Tensor, t: Tensor, cond: Condition) -> Prediction:
        alpha, sigma = (value[:, None] for value in self.path.alpha_sigma(t))
        x0 = self.x0(x, t)
        return Prediction(self.path, x0, (x - alpha * x0) / sigma, t)


def drawn_there(
    toy: Toy, sampler: str, levels: list[float], times: list[float], noise: Tensor, fresh: list[Tensor]
) -> Tensor:
    """What ComfyUI's samplers draw: on a table with states over alpha, and on a flow path with states as they are."""
    flow = isinstance(toy.path, FlowPath)
    scale = [
        1.0 if flow else (1 + level**2) ** 0.5 for level in levels
    ]  # of a state over that of the network
    x = noise * scale[0] if not flow else noise
    for i, (level, following) in enumerate(pairwise(levels)):
        clean = toy.x0(x / scale[i], torch.full((len(x),), times[i]))
        if sampler == "euler":
            x = x + (x - clean) / level * (following - level)
        else:
            x = (
                clean
                if following == 0
                else (1 - following) * clean + following * fresh[i]
                if flow
                else clean + following * fresh[i]
            )
    return x


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("path", [TABLE, FlowPath(3.0)], ids=["table", "flow"])
def test_its_sampler_on_its_noise_levels_draws_what_the_student_draws(path: NoisePath, renoise: bool) -> None:
    times = (1.0, 0.9, 0.6, 0.3)
    sampler, toy = Sampler(times, renoise), Toy(path)
    torch.manual_seed(0)
    noise, *fresh = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = sampler.draw(cast(Denoiser, toy), noise, Condition(), lambda i: fresh[i])
    nodes = made("StableDiffusionPipeline" if path is TABLE else "StableDiffusion3Pipeline", path, sampler)
    levels = [float(text) for text in named(nodes, "ManualSigmas")[0]["sigmas"].split(",")]
    kind = named(nodes, "KSamplerSelect")[0]["sampler_name"]
    assert kind == ("lcm" if renoise else "euler") and len(levels) == 5 and levels[-1] == 0
    found = drawn_there(toy, kind, levels, list(times), noise, fresh)
    assert (found - expected).abs().max() < 1e-5


def test_the_noise_levels_are_those_of_the_table() -> None:
    alphas = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    expected = ((1 - alphas) / alphas).sqrt()[[999, 749, 499, 249]].tolist()
    assert sigmas_of(TABLE, FOUR.times) == pytest.approx([*expected, 0.0], rel=1e-5)
    assert sigmas_of(TABLE, (1.0,))[0] == pytest.approx(14.6146, abs=1e-3)  # SDXL's largest
    assert sigmas_of(FlowPath(3.0), (1.0, 0.9)) == [1.0, 0.9, 0.0]
    with pytest.raises(UserError, match="starts below pure noise"):
        sigmas_of(TABLE, (0.625,))
    with pytest.raises(UserError, match="zero terminal SNR"):
        sigmas_of(TablePath.from_alphas_cumprod(torch.linspace(1, 0, 1000, dtype=torch.float64)), (1.0,))


@pytest.mark.parametrize("pipeline", list(PUBLISHED))
@pytest.mark.parametrize("whole", [False, True])
def test_every_workflow_has_documented_nodes_and_no_guidance(pipeline: str, whole: bool) -> None:
    flow = pipeline in ("StableDiffusion3Pipeline", "FluxPipeline")
    file = (
        StudentFile("unet/diffusion_pytorch_model.safetensors", None)
        if whole
        else StudentFile("lora.safetensors", 2.0)
    )
    nodes = made(pipeline, FlowPath(3.0) if flow else TABLE, student=file)
    check_workflow(nodes)  # also when it was written
    assert json.loads(json.dumps(nodes)) == nodes
    (drawn,) = named(nodes, "SamplerCustom")
    assert drawn["cfg"] == 1.0 and drawn["add_noise"] is True
    loras = named(nodes, "LoraLoaderModelOnly")
    assert [each["strength_model"] for each in loras] == ([] if whole else [2.0])
    loader = nodes[drawn["model"][0]]
    assert loader["class_type"] == ("UNETLoader" if whole else "LoraLoaderModelOnly")
    assert loader["_meta"]["title"].startswith(f"copy {file.file} to models/")
    (empty,) = named(nodes, "EmptySD3LatentImage" if flow else "EmptyLatentImage")
    assert (empty["width"], empty["height"]) == (1024, 768)
    assert [each["text"] for each in named(nodes, "CLIPTextEncode")] == ["a cat", ""]


def test_what_a_network_predicts_and_takes_is_told() -> None:
    nodes = made("StableDiffusionPipeline", TABLE, prediction_type="v_prediction")
    assert [each["sampling"] for each in named(nodes, "ModelSamplingDiscrete")] == ["v_prediction"]
    assert not named(made("StableDiffusionPipeline", TABLE), "ModelSamplingDiscrete")
    nodes = made("FluxPipeline", FlowPath(), guidance=3.5)
    assert [each["guidance"] for each in named(nodes, "FluxGuidance")] == [3.5]
    with pytest.raises(UserError, match="takes guidance as an input"):
        made("StableDiffusionXLPipeline", TABLE, guidance=3.5)
    with pytest.raises(UserError, match=r"TCD's gamma 0\.3"):
        made("StableDiffusionPipeline", TABLE, Sampler((1.0, 0.5), False, gamma=0.3))


def test_a_node_with_another_input_or_kind_is_found() -> None:
    nodes = made("StableDiffusionXLPipeline", TABLE)
    latent = next(node for node in nodes.values() if node["class_type"] == "EmptyLatentImage")
    latent["inputs"]["width"] = "1024"
    with pytest.raises(ValueError, match="width is str, and takes INT"):
        check_workflow(nodes)
    latent["inputs"]["width"] = 1024
    del latent["inputs"]["height"]
    with pytest.raises(ValueError, match="EmptyLatentImage, has inputs"):
        check_workflow(nodes)
    nodes = made("StableDiffusionXLPipeline", TABLE)
    decode = next(node for node in nodes.values() if node["class_type"] == "VAEDecode")
    decode["inputs"]["vae"] = ["1", 1]
    with pytest.raises(ValueError, match="vae is CLIP, and takes VAE"):
        check_workflow(nodes)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3-medium", "sd35-large", "flux-dev", "flux-schnell"])
def test_published_networks_are_known(name: str) -> None:
    found = json.loads((TEACHERS / f"{name}.json").read_text())
    kind, config = found["components"]["unet" if "unet" in found["components"] else "transformer"]
    assert kind and check_comfyui(found["pipeline"], config) is None


def test_others_are_refused() -> None:
    assert "and this is a WanPipeline" in str(check_comfyui("WanPipeline", {}))
    tiny = {"block_out_channels": (32, 64), "cross_attention_dim": 96}
    assert "this one's block_out_channels is (32, 64)" in str(check_comfyui("StableDiffusionPipeline", tiny))


def test_an_adapter_lies_beside_its_workflow_under_the_names_that_comfyui_reads(
    teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = teacher_of("sd")
    student = Adapters(teacher, 2, 6.0).student
    scheduler, prompt = teacher.pipe.scheduler, tiny_prompts("sd", 1)[0]
    save_adapters(student, teacher, tmp_path)
    save_comfyui(student, FOUR, teacher, scheduler, "someone/tiny-sd", prompt, tmp_path)
    nodes = json.loads((tmp_path / COMFYUI).read_text())
    (lora,) = named(nodes, "LoraLoaderModelOnly")
    assert lora["strength_model"] == 1.0 and (tmp_path / KOHYA).is_file()  # whose alpha is in the file
    assert named(nodes, "CheckpointLoaderSimple") == [{"ckpt_name": "tiny-sd.safetensors"}]
    assert named(nodes, "CLIPTextEncode")[0]["text"] == prompt
    other = tmp_path / "whole"
    (other / "unet").mkdir(parents=True)  # and no file of one network in it
    save_comfyui(student, FOUR, teacher, scheduler, teacher.pipe, prompt, other)
    assert not (other / COMFYUI).exists()
    assert "no workflow is written: the student's network is in several files" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"export\.comfyui is true, but ComfyUI knows networks of the published"
    ):
        check_options(ExportOptions(comfyui=True), teacher, lora=True, named=True)
