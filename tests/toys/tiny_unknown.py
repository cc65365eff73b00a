"""Tiny random pipelines of real classes that no family serves, one file of recording serves them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tiny
import tiny_more
import torch
import unknown_images
import unknown_images_more
import unknown_older
import unknown_videos
from tiny_parts import (
    BETAS,
    clip_text_encoder,
    clip_tokenizer,
    flow_euler,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
    unet2d_condition,
    with_pag,
)
from torch import nn

from stepdistill.families.size import Size
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.distil import run_recipe


def unknown_pipeline(name: str) -> Any:
    """A pipeline of the class, the same at every call; matrices of its network are drawn anew: some start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[name]()
        network = pipe.components.get("transformer") or pipe.unet
        for value in network.parameters():
            if value.ndim > 1:
                nn.init.normal_(value, std=0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_of(name: str, folder: Path, lora_rank: int) -> tuple[str, str]:
    """Two steps of DMD towards two times, to the verified student: what the run said, and the proof.

    Raises:
        UserError: the class cannot be recorded, or its student cannot be exported.
    """
    size = SIZES.get(name)
    unknown_pipeline(name).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red heart\nblue\n")
    sets = [
        *("train.updates=2", "train.batch=2", "train.preview_every=0", "train.precision=float32"),
        *("options.fake_warm_start=0", "student.output=teacher", "student.times=[1.0,0.5]"),
        *(f"data.prompts={folder / 'prompts.txt'}", "evaluate=false", f"student.lora_rank={lora_rank}"),
    ]
    if size is not None:
        sides = [size.height, size.width, *([size.frames] if size.frames > 1 else [])]
        sets.append(f"data.size={sides}")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        recipe = load_recipe(teacher=str(folder / "teacher"), method="dmd", sets=sets)
        run = run_recipe(recipe, output=folder / "run")
    assert run.report is not None
    return said.getvalue(), run.report.verification


SIZES = {
    "AllegroPipeline": Size(160, 160, 24),
    "BriaPipeline": Size(16, 24),
    "LattePipeline": Size(32, 32, 2),
    "MochiPipeline": Size(16, 32, 7),
    "OvisImagePipeline": Size(16, 24),
    "SanaPAGPipeline": Size(32, 32),
    "SanaVideoPipeline": Size(32, 32, 5),
    "SkyReelsV2DiffusionForcingPipeline": Size(32, 16, 9),
    "SkyReelsV2Pipeline": Size(32, 16, 9),
    "AnimateDiffPipeline": Size(32, 32, 2),
}
"""What those draw whose own default is that of the real ones."""


def _latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        vae=tiny_vae(),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=2,
        ),
        scheduler=diffusers.DDIMScheduler(**BETAS),
    )


def _lumina() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return diffusers.LuminaPipeline(
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        scheduler=flow_euler(),
        vae=tiny_vae(blocks=4),
        text_encoder=Gemma2Model(Gemma2Config(**tiny_more.GEMMA)).eval(),
        tokenizer=tiny_more._gemma_tokenizer(),
    )


def _allegro() -> Any:
    return diffusers.AllegroPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        vae=diffusers.AutoencoderKLAllegro(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, sample_size=160
        ),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=1,
            cross_attention_dim=48,
            sample_height=20,
            sample_width=20,
            sample_frames=6,
            caption_channels=16,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**BETAS),
    )


def _mochi() -> Any:
    return diffusers.MochiPipeline(
        scheduler=flow_euler(invert_sigmas=True),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=16,
            time_embed_dim=4,
        ),
    )


def _bria() -> Any:
    return diffusers.BriaPipeline(
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=[2, 2, 4],
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )


def _ovis() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return diffusers.OvisImagePipeline(
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=Qwen3Model(Qwen3Config(**tiny_more._qwen(layers=2), head_dim=8)).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def _sana_video() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return diffusers.SanaVideoPipeline(
        tokenizer=tiny_more._gemma_tokenizer(),
        text_encoder=Gemma2Model(Gemma2Config(**tiny_more.GEMMA)).eval(),
        vae=tiny._wan().vae,
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        scheduler=flow_euler(shift=7.0),
    )


def _sky_reels() -> Any:
    return diffusers.SkyReelsV2Pipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=tiny._wan().vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


def _cogview3() -> Any:
    return diffusers.CogView3PlusPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        vae=tiny_vae(),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            clip_sample=False,
        ),
    )


def _if() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
    )
    return diffusers.IFPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def _animate() -> Any:
    return diffusers.AnimateDiffPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(16, projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet2d_condition(cross_attention_dim=16),
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    )


def _lcm() -> Any:
    parts = tiny._sd().components
    return diffusers.LatentConsistencyModelPipeline(
        **{
            **parts,
            "unet": unet2d_condition(cross_attention_dim=16, time_cond_proj_dim=32),
            "scheduler": diffusers.LCMScheduler(**BETAS, clip_sample=False),
        },
        requires_safety_checker=False,
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "AllegroPipeline": _allegro,
    "AnimateDiffPipeline": _animate,
    "BriaPipeline": _bria,
    "CogView3PlusPipeline": _cogview3,
    "IFPipeline": _if,
    "LatentConsistencyModelPipeline": _lcm,
    "LattePipeline": _latte,
    "LuminaPipeline": _lumina,
    "MochiPipeline": _mochi,
    "OvisImagePipeline": _ovis,
    "PixArtSigmaPAGPipeline": with_pag("PixArtSigmaPAGPipeline", tiny_more._pixart_sigma, "blocks.1"),
    "SanaPAGPipeline": with_pag("SanaPAGPipeline", tiny_more._sana, "transformer_blocks.1"),
    "SanaVideoPipeline": _sana_video,
    "SkyReelsV2DiffusionForcingPipeline": lambda: diffusers.SkyReelsV2DiffusionForcingPipeline(
        **_sky_reels().components
    ),
    "SkyReelsV2Pipeline": _sky_reels,
    "StableDiffusionPAGPipeline": with_pag("StableDiffusionPAGPipeline", tiny._sd, "mid"),
    "StableDiffusion3PAGPipeline": with_pag("StableDiffusion3PAGPipeline", tiny._sd3, "blocks.1"),
    "StableDiffusionXLPAGPipeline": with_pag("StableDiffusionXLPAGPipeline", tiny._sdxl, "mid"),
}
"""By class."""
for _more in (unknown_images, unknown_images_more, unknown_older, unknown_videos):
    BUILDERS |= _more.BUILDERS
    SIZES |= _more.SIZES
