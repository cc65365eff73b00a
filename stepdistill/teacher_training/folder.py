"""What a finished training leaves: the pipeline folder with model card and picture, and the features."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, T5EncoderModel

from stepdistill.diffusion.draws import generator_for
from stepdistill.system.files import folder_written_whole
from stepdistill.teacher_training.networks import build_scheduler, text_encoder, text_encoder_with_projection
from stepdistill.teacher_training.settings import StageSettings, TeacherSettings
from stepdistill.teacher_training.stage import History

PICTURE_STEPS = (25, 4, 1)
PICTURE_COLUMNS, PICTURE_ROWS = 24, 2
GUIDANCE = 2.5
"""Guidance scale of the picture."""


@dataclass(frozen=True)
class Result:
    """A trained stage, for the card."""

    name: str
    settings: StageSettings
    parameters: int
    history: History


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` on a temporary folder and renames it: a folder of this name is complete."""
    with folder_written_whole(folder) as temporary:
        write(temporary)


def save_half(network: torch.nn.Module, folder: Path) -> None:
    """The network in float16 safetensors, with a config that loads it as float32."""
    half: ModelMixin = copy.deepcopy(network).cpu().half()  # type: ignore[assignment]  # or a PreTrainedModel
    half.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # a folder of this machine
    if "dtype" in config:
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def sd_pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The teacher of eps kind, sampled by DDIM."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(clip),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # type: ignore[arg-type]  # annotated with an enum of names
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def flow_pipeline(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    t5: T5EncoderModel,
    shift: float,
) -> StableDiffusion3Pipeline:
    """The teacher of flow kind: CLIP's text tower in both places, a T5 that says nothing, Euler steps on shifted
    times."""
    encoder = text_encoder_with_projection(clip)
    vae = copy.deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)  # this pipeline adds it
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    )


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """The pipeline as a diffusers folder, its networks in float16."""
    pipeline.save_pretrained(folder)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            save_half(component, folder / name)


@torch.no_grad()
def draw_picture(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    images: Tensor,
    captions: Sequence[str],
    seed: int,
) -> Image.Image:
    """Rows of real images [N, 3, 32, 32], then their captions drawn in 25, 4 and 1 steps from equal noise."""
    count = min(PICTURE_COLUMNS * PICTURE_ROWS, len(images))
    chosen = [i * len(images) // count for i in range(count)]
    prompts = [captions[i] for i in chosen]
    is_flow = isinstance(pipeline, StableDiffusion3Pipeline)
    network = pipeline.transformer if is_flow else pipeline.unet
    shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
    noise = torch.stack(
        [torch.randn(shape, generator=generator_for(seed, "picture", i)) for i in range(count)]
    )
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[no-untyped-call]
    blocks = [((images[chosen].permute(0, 2, 3, 1).cpu().numpy() + 1) / 2).clip(0, 1)]
    for steps in PICTURE_STEPS:
        # The flow scheduler's own grid ends at 1/1000 instead of 1/n: with few steps that is a wasted step.
        grid = (
            {"sigmas": np.linspace(1, 1 / steps, steps).tolist()}
            if is_flow
            else {"num_inference_steps": steps}
        )
        start = noise.to(network.device)
        drawn = pipeline(prompts, latents=start, guidance_scale=GUIDANCE, output_type="np", **grid)
        blocks.append(drawn.images)
    return Image.fromarray(np.concatenate([_rows(np.asarray(block)) for block in blocks]))


def _rows(block: np.ndarray) -> np.ndarray:
    """Images [K, 32, 32, 3] in [0, 1] as rows of PICTURE_COLUMNS, padded with white: uint8 [H, W, 3]."""
    missing = -len(block) % PICTURE_COLUMNS
    padded = np.concatenate([block, np.ones((missing, *block.shape[1:]), block.dtype)])
    grid = padded.reshape(-1, PICTURE_COLUMNS, *block.shape[1:])  # [rows, columns, 32, 32, 3]
    joined = grid.transpose(0, 2, 1, 3, 4).reshape(-1, PICTURE_COLUMNS * block.shape[2], 3)
    return (joined * 255).round().astype(np.uint8)


def card(
    pipeline_class: str,
    settings: TeacherSettings,
    results: Sequence[Result],
    measured: dict[str, float],
    images: int,
    device: torch.device,
    command: str,
) -> str:
    """The model card: what the teacher is, the command, and what was measured."""
    rows = [
        f"| {r.name} | {r.parameters / 1e6:.2f} M | {r.settings.steps} | {r.settings.batch} |"
        f" {r.history.start():.4f} | {r.history.end():.4f} | {r.history.seconds:.0f} |"
        for r in results
    ]
    others = f"- Tokenizer, VAE and CLIP are those of the embedded teacher {settings.parts}."
    if measured:
        others = (
            f"- Reconstructions of the autoencoder: {measured['psnr']:.2f} dB PSNR over all images.\n"
            f"- CLIP: the right caption is among the nearest 5 of {images} for {measured['retrieval']:.0%} of the\n"
            "  images held out of its training (every 20th)."
        )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# A small text-to-image teacher: emoji of 32x32 pixels from their names

`{pipeline_class}.from_pretrained` loads this folder. Size `{settings.size}`, seed {settings.seed},
trained on {images} Noto emoji with their English names; {settings.caption_dropout:.0%} of the captions
were replaced by the empty one. Made by

    {command}

on {_name(device)}, Python {platform.python_version()}, torch {torch.__version__},
diffusers {diffusers.__version__}, transformers {transformers.__version__}.

| stage | parameters | steps | batch | loss, first 5 % of the steps | loss, last 5 % | seconds |
| --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{others}
- Weights are stored as float16, which is what every later stage saw of them, and load as float32.

`steps.png`: {PICTURE_ROWS} rows of real images, then the teacher on the same captions in {PICTURE_STEPS[0]},
{PICTURE_STEPS[1]} and {PICTURE_STEPS[2]} steps, guidance {GUIDANCE}, from the same noise.

The real images are Google's Noto Emoji, Apache License 2.0.
"""


def judge_card(
    result: Result, measured: dict[str, float], images: int, device: torch.device, command: str
) -> str:
    """What the judge is, the command, and what was measured."""
    settings, history = result.settings, result.history
    return f"""# The judge: a second network that looks at the emoji

A residual convolutional classifier of {result.parameters / 1e6:.2f} M parameters, for FD-judge and judge fit. Made by

    {command}

on {_name(device)}, Python {platform.python_version()}, torch {torch.__version__}:
{settings.steps} steps of {settings.batch} images in {history.seconds:.0f} seconds. The loss was
{history.start():.3f} in the first 5 % of the steps and {history.end():.3f} in the last.

Of the {measured["held_out"]:.0f} of {images} images held out of its training (every 20th, as of the embedded CLIP's):

- the Unicode group is right for {measured["group"]:.1%};
- the likeliest word is one of the caption's for {measured["first_word"]:.1%} (of captions with a word it has met);
- the right caption is among the best 5 of all {images} for {measured["retrieval"]:.1%}.

How far it says of them what the embedded CLIP says (0: nothing in common, 1: the same):

- rank correlation of the similarities of all pairs of pictures {measured["pairs"]:.2f};
- of the 10 nearest pictures of each, {measured["near"]:.0%} are the same;
- rank correlation of how well each picture fits its own caption {measured["captions"]:.2f}.

Weights are stored as float16 and load as float32. The images are Google's Noto Emoji, Apache License 2.0.
"""


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
