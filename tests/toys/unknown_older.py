"""Tiny random pipelines of older classes that no family serves, with quantised latents and without text among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny
from tiny_parts import (
    BETAS,
    clip_tokenizer,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
    unet2d_condition,
)

from stepdistill.families.size import Size

SIZES = {
    "Kandinsky3Pipeline": Size(64, 64),
    "StableDiffusionPanoramaPipeline": Size(32, 32),
}


def _vq(blocks: int = 2, spatial: bool = False) -> Any:
    return diffusers.VQModel(
        block_out_channels=(32 if spatial else 8,) * blocks,  # a spatial norm is of 32 groups
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=4,
        scaling_factor=0.5,
        norm_type="spatial" if spatial else "group",
    )


def _unet_of_latents() -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def _ldm_text() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig(
        vocab_size=2048,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=16,
        init_std=0.5,
    )
    return diffusers.LDMTextToImagePipeline(
        vqvae=tiny_vae(blocks=4),
        bert=LDMBertModel(config).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet2d_condition(cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    )


def _ldm() -> Any:
    return diffusers.LDMPipeline(
        vqvae=_vq(), unet=_unet_of_latents(), scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    )


def _pndm() -> Any:
    return diffusers.PNDMPipeline(unet=tiny._unet2d(), scheduler=diffusers.PNDMScheduler())


def _kandinsky3() -> Any:
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        unet=diffusers.Kandinsky3UNet(
            time_embedding_dim=8,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 16),
            cross_attention_dim=16,
            encoder_hid_dim=16,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2", steps_offset=1
        ),
        movq=_vq(blocks=4, spatial=True),
    )


def _of_sd(kind: str, **more: Callable[[], Any]) -> Callable[[], Any]:
    """A class with Stable Diffusion's components, and others in place of or beside them."""

    def made() -> Any:
        parts = {**tiny._sd().components, **{name: build() for name, build in more.items()}}
        return getattr(diffusers, kind)(**parts, requires_safety_checker=False)

    return made


def _vae_of_depth() -> Any:
    return diffusers.AutoencoderKL(
        in_channels=6,
        out_channels=6,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "Kandinsky3Pipeline": _kandinsky3,
    "LDMPipeline": _ldm,
    "LDMTextToImagePipeline": _ldm_text,
    "PNDMPipeline": _pndm,
    "StableDiffusionLDM3DPipeline": _of_sd("StableDiffusionLDM3DPipeline", vae=_vae_of_depth),
    "StableDiffusionPanoramaPipeline": _of_sd("StableDiffusionPanoramaPipeline"),
    "StableDiffusionSAGPipeline": _of_sd("StableDiffusionSAGPipeline"),
}
"""By class."""
