"""Tiny random pipelines of text-to-video classes that no family serves, of 2025 and 2026."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny
import tiny_more
from tiny_parts import (
    BETAS,
    clip_text_encoder,
    clip_tokenizer,
    flow_euler,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
    unet2d_condition,
)

from stepdistill.families.size import Size

SIZES = {
    "HunyuanVideo15Pipeline": Size(16, 24, 5),
    "LTX2Pipeline": Size(32, 32, 5),
    "LTXConditionPipeline": Size(32, 32, 9),
    "AnimateDiffSDXLPipeline": Size(32, 32, 2),
    "AnimateDiffPAGPipeline": Size(32, 32, 2),
    "EasyAnimatePipeline": Size(16, 16, 5),
    "MotifVideoPipeline": Size(32, 16, 9),
    "HeliosPipeline": Size(16, 16, 9),
}


def _hunyuan_video_1_5() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import (
        ByT5Tokenizer,
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        T5Config,
        T5EncoderModel,
    )

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    glyphs: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1}
    return diffusers.HunyuanVideo15Pipeline(
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=flow_euler(shift=7.0),
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(**tiny_more._qwen(layers=3), rope_scaling=rope)
        ).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, **glyphs)).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


def _ltx_2() -> Any:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text: dict[str, Any] = {**tiny_more.GEMMA, "num_hidden_layers": 2}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        sample_rate=16000,
        mel_hop_length=160,
        is_causal=True,
        mel_bins=8,
    )
    connector: dict[str, Any] = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 2),
            ("attention_head_dim", 8),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    return diffusers.LTX2Pipeline(
        scheduler=flow_euler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        ).eval(),
        tokenizer=tiny_more._gemma_tokenizer(),
        connectors=LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=3,
            connector_rope_base_seq_len=32,
            rope_double_precision=False,
            rope_type="split",
            **connector,
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=16,
            rope_double_precision=False,
            rope_type="split",
        ),
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
    )


def _ltx_condition() -> Any:
    return diffusers.LTXConditionPipeline(**{**tiny_more._ltx().components, "scheduler": flow_euler()})


def _animate_sdxl() -> Any:
    parts = tiny._sdxl().components
    keep = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    return diffusers.AnimateDiffSDXLPipeline(
        **{name: parts[name] for name in keep},
        motion_adapter=_motion(use_motion_mid_block=False),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    )


def _motion(**more: Any) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **more,
    )


def _animate_pag() -> Any:
    return diffusers.AnimateDiffPAGPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(16, projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet2d_condition(cross_attention_dim=16),
        motion_adapter=_motion(),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False),
        pag_applied_layers="mid_block.*attn1",
    )


def _easy_animate() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    config = Qwen2VLConfig(
        text_config={**tiny_more._qwen(layers=2), "rope_scaling": rope},
        vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
    )
    tokenizer = tiny_more.qwen_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'][0]['text'] }}\n{% endfor %}assistant"
    )
    down, up = ((f"Spatial{kind}Block3D", *(f"SpatialTemporal{kind}Block3D",) * 3) for kind in ("Down", "Up"))
    return diffusers.EasyAnimatePipeline(
        vae=diffusers.AutoencoderKLMagvit(
            down_block_types=down,
            up_block_types=up,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
        text_encoder=Qwen2VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=16,
            num_layers=2,
            sample_width=16,
            sample_height=16,
            patch_size=2,
        ),
        scheduler=flow_euler(),
    )


def _motif_video() -> Any:
    from diffusers.guiders import AdaptiveProjectedGuidance
    from transformers import T5Gemma2Encoder, T5Gemma2EncoderConfig, T5Gemma2TextConfig

    text = T5Gemma2TextConfig(**{**tiny_more.GEMMA, "max_position_embeddings": 512, "dropout_rate": 0.0})
    return diffusers.MotifVideoPipeline(
        vae=tiny._wan().vae,
        scheduler=flow_euler(shift=7.0),
        text_encoder=T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text)).eval(),
        tokenizer=tiny_more._gemma_tokenizer(),
        transformer=diffusers.MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            mlp_ratio=2.0,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
        ),
        guider=AdaptiveProjectedGuidance(),
    )


def _helios() -> Any:
    return diffusers.HeliosPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(16),
        transformer=diffusers.HeliosTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_dim=(4, 4, 4),
            has_multi_term_memory_patch=True,
            guidance_cross_attn=True,
            zero_history_timestep=True,
            is_amplify_history=False,
        ),
        vae=tiny._wan().vae,
        scheduler=diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "HunyuanVideo15Pipeline": _hunyuan_video_1_5,
    "LTX2Pipeline": _ltx_2,
    "LTXConditionPipeline": _ltx_condition,
    "AnimateDiffSDXLPipeline": _animate_sdxl,
    "EasyAnimatePipeline": _easy_animate,
    "MotifVideoPipeline": _motif_video,
    "HeliosPipeline": _helios,
    "AnimateDiffPAGPipeline": _animate_pag,
}
