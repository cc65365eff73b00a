"""Tiny random pipelines of text-to-image classes that no family serves, of 2025 and 2026."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import tiny_more
from tiny_parts import flow_euler, tiny_vae

from stepdistill.families.size import Size


def qwen3_vl(layers: int, width: int = 16) -> Any:
    """Config of a Qwen3-VL model."""
    from transformers import Qwen3VLConfig

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {**tiny_more._qwen(layers, width), "head_dim": 8, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def _qwen2_5_vl(layers: int) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = tiny_more._qwen_image().text_encoder.config
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    text |= {"num_hidden_layers": layers, "layer_types": None}
    return Qwen2_5_VLForConditionalGeneration(type(config)(text_config=text, vision_config=vision)).eval()


def qwen3_vl_processor() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = tiny_more.qwen_tokenizer()
    pads = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": pads})
    chat = tiny_more.CHAT.replace(
        "m['content']", "m['content'] if m['content'] is string else m['content'][0]['text']"
    )
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=chat,
    )


def _hunyuan_image(guided: bool = True) -> Any:
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1}
    guiders = [diffusers.AdaptiveProjectedMixGuidance() if guided else None for _ in range(2)]
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=not guided,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(4, 4),
        ),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            scaling_factor=0.5,
            spatial_compression_ratio=4,
            sample_size=32,
        ),
        scheduler=flow_euler(shift=7.0),
        text_encoder=_qwen2_5_vl(layers=2),
        tokenizer=tiny_more.qwen_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=1510, **sizes)).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=guiders[0],
        ocr_guider=guiders[1],
    )


def _hunyuan_image_distilled() -> Any:
    return _hunyuan_image(guided=False)


def _qwen_image_21() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return diffusers.QwenImage21Pipeline(
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True, True],
            latents_mean=[-0.7, 0.1, 0.4, 0.9],
            latents_std=[2.8, 1.4, 0.9, 1.7],
        ),
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl(layers=2)).eval(),
        processor=qwen3_vl_processor(),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
    )


def _krea2() -> Any:
    from transformers import Qwen3VLModel

    return diffusers.Krea2Pipeline(
        scheduler=flow_euler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=tiny_more._qwen_image().vae,
        text_encoder=Qwen3VLModel(qwen3_vl(layers=2)).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        text_encoder_select_layers=(0, 1, 2),
    )


def _prx_pixel() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return diffusers.PRXPixelPipeline(
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=3,
            patch_size=4,
            context_in_dim=16,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            axes_dim=[4, 4],
            bottleneck_size=8,
            resolution_embeds=True,
        ),
        scheduler=flow_euler(shift=3.0),
        text_encoder=Qwen3Model(Qwen3Config(**tiny_more._qwen(layers=2), head_dim=8)).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
    )


def _longcat() -> Any:
    from transformers import Qwen2VLProcessor

    processor = qwen3_vl_processor()
    return diffusers.LongCatImagePipeline(
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKL(**{**tiny_vae(shift=0.1, quant=False).config, "latent_channels": 16}),
        text_encoder=tiny_more._qwen_image().text_encoder,
        tokenizer=tiny_more.qwen_tokenizer(),
        text_processor=Qwen2VLProcessor(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            video_processor=processor.video_processor,
            chat_template=processor.chat_template,
        ),
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 2, 2],
        ),
    )


def _ideogram() -> Any:
    from transformers import Qwen3VLModel

    def network() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=8,
            llm_features_dim=13 * 8,
            mrope_section=(2, 1, 1),
        )

    tokenizer = tiny_more.qwen_tokenizer()
    tokenizer.chat_template = tiny_more.CHAT.replace("m['content']", "m['content'][0]['text']")
    return diffusers.Ideogram4Pipeline(
        scheduler=flow_euler(),
        vae=tiny_more._flux_2(guidance_embeds=False)["vae"],
        text_encoder=Qwen3VLModel(qwen3_vl(layers=36, width=8)).eval(),
        tokenizer=tokenizer,
        transformer=network(),
        unconditional_transformer=network(),
    )


def _nucleus() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return diffusers.NucleusMoEImagePipeline(
        transformer=diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
            dense_moe_strategy="all_moe",
            num_experts=4,
            moe_intermediate_dim=8,
            capacity_factors=[2.0, 2.0],
        ),
        scheduler=flow_euler(),
        vae=tiny_more._qwen_image().vae,
        text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl(layers=8)).eval(),
        processor=qwen3_vl_processor(),
    )


def _ernie() -> Any:
    from transformers import Mistral3Config, Mistral3Model

    return diffusers.ErnieImagePipeline(
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=16,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=16,
            rope_axes_dim=(4, 2, 2),
        ),
        vae=tiny_more._flux_2(guidance_embeds=False)["vae"],
        text_encoder=Mistral3Model(
            Mistral3Config(
                text_config={"model_type": "mistral", **tiny_more._qwen(layers=2), "head_dim": 8},
                vision_config={
                    "model_type": "pixtral",
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            )
        ).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
        scheduler=flow_euler(shift=3.0),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "HunyuanImagePipeline": _hunyuan_image,
    "HunyuanImagePipeline distilled": _hunyuan_image_distilled,
    "QwenImage21Pipeline": _qwen_image_21,
    "Krea2Pipeline": _krea2,
    "LongCatImagePipeline": _longcat,
    "Ideogram4Pipeline": _ideogram,
    "NucleusMoEImagePipeline": _nucleus,
    "PRXPixelPipeline": _prx_pixel,
    "ErnieImagePipeline": _ernie,
}
"""By class."""

SIZES = {
    "HunyuanImagePipeline": Size(16, 24),
    "HunyuanImagePipeline distilled": Size(16, 24),
    "QwenImage21Pipeline": Size(32, 64),
    "Krea2Pipeline": Size(16, 24),
    "LongCatImagePipeline": Size(16, 24),
    "Ideogram4Pipeline": Size(16, 24),
    "NucleusMoEImagePipeline": Size(16, 24),
    "PRXPixelPipeline": Size(16, 24),
    "ErnieImagePipeline": Size(16, 24),
}
