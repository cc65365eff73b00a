"""Tiny random pipelines of every family: real diffusers components, seeded, less than a megabyte each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepdistill.families.size import Size
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.emoji import tokenizer_folder

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
)
"""What ``tiny_pipeline`` builds, one or more for every family."""

WITH_TEXT = ("sd", "sd-v", "sdxl", "sd3", "flux", "schnell", "wan")
WITH_VAE = ("dit", *WITH_TEXT)
FLOW = ("sd3", "flux", "schnell", "wan")
GUIDED = ("dit", "sd", "sd-v", "sdxl", "sd3", "wan")
"""With an unconditional mode: guidance is extrapolation."""

SIZES = {"flux": Size(16, 24), "schnell": Size(16, 24), "wan": Size(32, 16, 9)}
"""What tiny pipelines draw whose own default is that of the real ones."""

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline(name: str) -> Any:
    """A pipeline of PIPELINES with random weights, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PIPELINES.index(name))
        pipe = BUILDERS[name]()
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
    return captions[:count] if name in WITH_TEXT else [str(i) for i in range(count)]


def call_of(name: str, prompts: list[str], guidance: float) -> dict[str, Any]:
    """The arguments with which the pipeline itself draws the prompts; guidance 0 is none."""
    if name in ("unet-ddpm", "unet-ddim"):
        return {"batch_size": len(prompts)}
    if name == "unet-classes":
        return {"batch_size": len(prompts), "class_labels": [int(prompt) for prompt in prompts]}
    if name == "dit":
        return {"class_labels": [int(prompt) for prompt in prompts], "guidance_scale": guidance}
    size = SIZES.get(name)
    sides = {"height": size.height, "width": size.width} if size else {}
    frames = {"num_frames": size.frames} if name == "wan" and size else {}
    return {"prompt": prompts, "guidance_scale": guidance, **sides, **frames}


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
        text_encoder=_text_encoder(16, projected=False),
        tokenizer=_tokenizer(),
        unet=_unet2d_condition(cross_attention_dim=16),
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
        text_encoder=_text_encoder(16, projected=False),
        text_encoder_2=_text_encoder(16, projected=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet2d_condition(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS),
    )


def _sd3() -> Any:
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
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=_text_encoder(16, projected=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_text_encoder(16, projected=True),
        tokenizer_2=_tokenizer(),
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
        text_encoder=_text_encoder(16, projected=False),
        tokenizer=_tokenizer(),
        text_encoder_2=tiny_t5(16),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def _schnell() -> Any:
    return _flux(guidance_embeds=False)


def _wan() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    transformer = WanTransformer3DModel(
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
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "unet-ddpm": _unet_ddpm,
    "unet-ddim": _unet_ddim,
    "unet-classes": _unet_classes,
    "dit": _dit,
    "sd": _sd,
    "sd-v": _sd_v,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "schnell": _schnell,
    "wan": _wan,
}


def _unet2d_condition(cross_attention_dim: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=cross_attention_dim,
        **more,
    )


def tiny_vae(shift: float | None = None, quant: bool = True) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=False,
    )


def tiny_t5_tokenizer() -> Any:
    """A T5 tokenizer of single letters."""
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0), *letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    size: dict[str, Any] = {"d_model": width, "d_kv": 8, "num_heads": 2, "d_ff": 2 * width, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=30, feed_forward_proj="gated-gelu", **size)).eval()


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tokenizer_folder())


def _text_encoder(width: int, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=width,
        bos_token_id=2046,
        eos_token_id=2047,
        pad_token_id=2047,
        initializer_factor=2.0,
    )
    return CLIPTextModelWithProjection(config).eval() if projected else CLIPTextModel(config).eval()
