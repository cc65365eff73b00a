"""Tiny random pipelines of every family: real diffusers components, seeded, less than a megabyte each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_more
import torch
from tiny_parts import (
    BETAS,
    clip_text_encoder,
    clip_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
    unet2d_condition,
)
from torch import nn

from stepdistill.families.size import Size
from stepdistill.networks.teacher import PipelineTeacher

PIPELINES = (
    "unet-ddpm",
    "unet-ddim",
    "unet-classes",
    "dit",
    "sd",
    "sd-v",
    "sdxl",
    "sd3",
    "flux",
    "schnell",
    "wan",
    "pixart-alpha",
    "pixart-sigma",
    "aura-flow",
    "qwen-image",
    "z-image",
    "sana",
    "klein",
    "ltx",
    "hunyuan-video",
    "cog-video-x",
    "wan-2.2",
    "cogview4",
    "lumina2",
    "hunyuan-dit",
    "chroma",
    "sana-sprint",
    "cog-video-x-1.5",
    "sd3.5",
    "flux-2",
    "kandinsky5",
    "text-to-video",
)
"""What ``tiny_pipeline`` builds, one or more for every family."""

NEW_FLOW = ("cogview4", "lumina2", "chroma", "sd3.5", "flux-2", "kandinsky5")
MORE_FLOW = ("aura-flow", "qwen-image", "z-image", "sana", "klein", "ltx", "hunyuan-video", *NEW_FLOW)
MORE = (
    "pixart-alpha",
    "pixart-sigma",
    "hunyuan-dit",
    *MORE_FLOW,
    "cog-video-x",
    "cog-video-x-1.5",
    "sana-sprint",
    "text-to-video",
)
"""Those of tiny_more.py, with which fewer things are tried that no family has to do with."""

EMBEDDED = ("flux", "flux-2", "hunyuan-video", "sana-sprint")
"""With guidance as an input of the network."""

WITH_TEXT = ("sd", "sd-v", "sdxl", "sd3", "flux", "schnell", "wan", "wan-2.2", *MORE)
VIDEO = (
    "wan",
    "wan-2.2",
    "ltx",
    "hunyuan-video",
    "cog-video-x",
    "cog-video-x-1.5",
    "kandinsky5",
    "text-to-video",
)
WITH_VAE = ("dit", *WITH_TEXT)
FLOW = ("sd3", "flux", "schnell", "wan", "wan-2.2", *MORE_FLOW)
GUIDED = (
    "dit",
    "sd",
    "sd-v",
    "sdxl",
    "sd3",
    "wan",
    "wan-2.2",
    *(name for name in MORE if name not in EMBEDDED),
)
"""With an unconditional mode: guidance is extrapolation."""

SIZES = {
    **dict.fromkeys(("wan", "wan-2.2"), Size(32, 16, 9)),
    **dict.fromkeys(
        ("flux", "schnell", "pixart-alpha", "aura-flow", "qwen-image", "klein", "flux-2", "chroma"),
        Size(16, 24),
    ),
    "z-image": Size(32, 16),
    "ltx": Size(32, 64, 9),
    "hunyuan-video": Size(16, 32, 9),
    "sana-sprint": Size(32, 64),
    "kandinsky5": Size(16, 32, 5),
    "text-to-video": Size(16, 24, 3),
}
"""What tiny pipelines draw whose own default is that of the real ones."""


def tiny_pipeline(name: str) -> Any:
    """A pipeline of PIPELINES with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PIPELINES.index(name))
        pipe = (BUILDERS | tiny_more.BUILDERS)[name]()
        # Random text encoders hardly tell two prompts apart: louder conditioning, so that a wrong one is seen.
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _louder(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_teacher(name: str) -> PipelineTeacher:
    """A teacher around ``tiny_pipeline(name)``."""
    return PipelineTeacher(tiny_pipeline(name), size=SIZES.get(name))


def tiny_prompts(name: str, count: int) -> list[str]:
    """Prompts that the pipeline takes: captions, class numbers, or anything."""
    captions = ["a red heart", "smiling cat face", "yellow star", "blue fish", "a green leaf", "flag"]
    if name == "cogview4":  # as short as each other: its pipeline reads what pads one to the next
        captions.remove("smiling cat face")
    if name == "kandinsky5":  # the same, of the first two
        captions = [*captions[2::2], *captions[:2], *captions[3::2]]
    return captions[:count] if name in WITH_TEXT else [str(i) for i in range(count)]


def call_of(name: str, prompts: list[str], guidance: float) -> dict[str, Any]:
    """The arguments with which the pipeline itself draws the prompts; guidance 0 is none."""
    if name in ("unet-ddpm", "unet-ddim"):
        return {"batch_size": len(prompts)}
    if name == "unet-classes":
        return {"batch_size": len(prompts), "class_labels": [int(prompt) for prompt in prompts]}
    if name == "dit":
        return {"class_labels": [int(prompt) for prompt in prompts], "guidance_scale": guidance}
    prompted: dict[str, Any] = {"prompt": list(prompts)}  # one of them writes into it
    if name == "qwen-image":
        prompted |= {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)}
    else:
        # Z-Image adds the scale to the prompt's own output.
        prompted["guidance_scale"] = guidance - 1 if name == "z-image" and guidance else guidance
    if name.startswith(("pixart", "sana", "hunyuan-dit")):
        prompted["use_resolution_binning"] = False
    size = Size(32, 32) if name == "sana" else SIZES.get(name)  # its own default is 1024
    sides = {"height": size.height, "width": size.width} if size else {}
    frames = {"num_frames": size.frames} if size and size.frames > 1 else {}
    return {**prompted, **sides, **frames}


def shaken(net: nn.Module, amount: float = 0.2, seed: int = 1) -> None:
    """Moves every weight by a random part of its own size, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            size = value.square().mean().sqrt() + 0.01
            value.add_(amount * size * torch.randn(value.shape, generator=generator))


def _louder(component: nn.Module) -> None:
    with torch.no_grad():
        for name, value in component.named_parameters():
            if value.ndim > 1 and (
                "attn2" in name or "embed" in name or "conv_out" in name or "proj_out" in name
            ):
                value.mul_(2.0)


def _unet2d(out_channels: int = 3, **more: Any) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        **more,
    )


def _unet_ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet=_unet2d(), scheduler=DDPMScheduler())


def learned_variance() -> Any:
    """An unconditional pipeline whose network also returns its variances."""
    from diffusers import DDPMPipeline, DDPMScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = DDPMPipeline(
            unet=_unet2d(out_channels=6), scheduler=DDPMScheduler(variance_type="learned_range")
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flagging_checker() -> dict[str, Any]:
    """A safety checker that flags every picture, with its feature extractor, as components of a pipeline."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "projection_dim": 8}
    config = CLIPConfig(
        projection_dim=8,
        text_config={**size, "vocab_size": 99},
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )
    checker = StableDiffusionSafetyChecker(config)
    torch.nn.init.constant_(checker.concept_embeds_weights, -2.0)
    square = {"height": 32, "width": 32}
    return {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square),
    }


def _unet_ddim() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(unet=_unet2d(), scheduler=DDIMScheduler())


def _unet_classes() -> Any:
    from diffusers import ConsistencyModelPipeline, DDIMScheduler

    return ConsistencyModelPipeline(unet=_unet2d(num_class_embeds=10), scheduler=DDIMScheduler())


def _dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    labels: Any = {0: "tench, Tinca", 1: "goldfish"}
    return DiTPipeline(
        transformer=transformer, vae=tiny_vae(), scheduler=DDIMScheduler(**BETAS), id2label=labels
    )


def _sd(prediction_type: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(16, projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet2d_condition(cross_attention_dim=16),
        scheduler=DDIMScheduler(
            **BETAS,
            prediction_type=prediction_type,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def _sd_v() -> Any:
    return _sd("v_prediction")


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(16, projected=False),
        text_encoder_2=clip_text_encoder(16, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet2d_condition(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS),
    )


def _sd3_5() -> Any:
    return _sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def _sd3(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        **more,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=clip_text_encoder(16, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder(16, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


def _flux(guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=clip_text_encoder(16, projected=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=tiny_t5(16),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def _schnell() -> Any:
    return _flux(guidance_embeds=False)


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def _wan(two: bool = False) -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    transformer = _wan_transformer()
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, 0.9],
        latents_std=[2.8, 1.4, 0.9, 1.7],
    )
    return WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
        **({"transformer_2": _wan_transformer(), "boundary_ratio": 0.9} if two else {}),
    )


def _wan_2_2() -> Any:
    """Whose network changes between the second and the third of four steps with its shift."""
    return _wan(two=True)


BUILDERS: dict[str, Callable[[], Any]] = {
    "unet-ddpm": _unet_ddpm,
    "unet-ddim": _unet_ddim,
    "unet-classes": _unet_classes,
    "dit": _dit,
    "sd": _sd,
    "sd-v": _sd_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd3.5": _sd3_5,
    "flux": _flux,
    "schnell": _schnell,
    "wan": _wan,
    "wan-2.2": _wan_2_2,
}
