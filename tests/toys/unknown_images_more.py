"""Tiny random pipelines of further text-to-image classes that no family serves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffusers
import tiny_more
from tiny_parts import flow_euler, tiny_t5_tokenizer, tiny_vae, with_pag
from unknown_images import qwen3_vl, qwen3_vl_processor

from stepdistill.families.size import Size

SIZES: dict[str, Size] = {
    "BriaFiboPipeline": Size(32, 48),
    "BriaFibo2Pipeline": Size(32, 16),
    "DreamLitePipeline": Size(32, 32),
    "OmniGenPipeline": Size(32, 32),
    "ZImageOmniPipeline": Size(32, 16),
}


def _kandinsky5_image() -> Any:
    """It always draws a million pixels, whatever it is asked for."""
    video = tiny_more._kandinsky5()
    pipe = diffusers.Kandinsky5T2IPipeline(**{**video.components, "vae": tiny_vae(blocks=4)})
    # Of the tokens of its template it drops the first 40: no more than these may stand before the prompt.
    words = tuple(dict.fromkeys(re.findall("[A-Za-z]+", pipe.prompt_template)))
    pipe.register_modules(tokenizer=tiny_t5_tokenizer(words), scheduler=flow_euler(shift=3.0))
    return pipe


def _small_wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[-0.7, 0.1, 0.4, 0.9],
        latents_std=[2.8, 1.4, 0.9, 1.7],
    )


def _fibo() -> Any:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    # It knows a token of the number 128000, which stands for an empty prompt.
    config = {**tiny_more._qwen(layers=2), "hidden_size": 8, "vocab_size": 128001, "pad_token_id": 0}
    return diffusers.BriaFiboPipeline(
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            text_encoder_dim=8,
            axes_dims_rope=[2, 2, 4],
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=_small_wan_vae(),
        text_encoder=SmolLM3ForCausalLM(SmolLM3Config(**config)).eval(),
        tokenizer=tiny_more.qwen_tokenizer(),
    )


def _fibo_2() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    encoder = Qwen3VLForConditionalGeneration(qwen3_vl(layers=36, width=8)).eval()  # the 35th is read
    return diffusers.BriaFibo2Pipeline(
        transformer=diffusers.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=24,
            injection_layer_ids=(0, 0, 1, 1, 1),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=40,
            gist_max_text_len=80,
            axes_dims=(4, 2, 2),
            axes_lens=(300, 32, 32),
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
        vae=tiny_more._flux_2(guidance_embeds=False)["vae"],
        text_encoder=encoder,
        processor=qwen3_vl_processor(),
    )


def _dream_lite() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    encoder, processor = Qwen3VLForConditionalGeneration(qwen3_vl(layers=2)).eval(), qwen3_vl_processor()
    return diffusers.DreamLitePipeline(
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        processor=processor,
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        ),
        unet=diffusers.DreamLiteUNetModel(
            sample_size=8,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(8, 16),
            cross_attention_dim=16,
            attention_head_dim=8,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        scheduler=flow_euler(use_dynamic_shifting=True),
    )


def _omni_gen() -> Any:
    return diffusers.OmniGenPipeline(
        transformer=diffusers.OmniGenTransformer2DModel(
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=30,
            time_step_dim=4,
            rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        ),
        scheduler=flow_euler(invert_sigmas=True, num_train_timesteps=1),
        vae=tiny_vae(blocks=4),
        tokenizer=tiny_t5_tokenizer(),
    )


def _z_image_omni() -> Any:
    from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

    parts = tiny_more._z_image().components
    config = {**parts["transformer"].config, "siglip_feat_dim": 16}
    siglip = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_patches=16,
        patch_size=4,
    )
    transformer = diffusers.ZImageTransformer2DModel.from_config(config)
    tiny_more._drawn(transformer)
    return diffusers.ZImageOmniPipeline(
        **{**parts, "transformer": transformer},
        siglip=Siglip2VisionModel(siglip).eval(),
        siglip_processor=Siglip2ImageProcessor(patch_size=4, max_num_patches=16),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "Kandinsky5T2IPipeline": _kandinsky5_image,
    "HunyuanDiTPAGPipeline": with_pag("HunyuanDiTPAGPipeline", tiny_more._hunyuan_dit, "blocks.1"),
    "DreamLitePipeline": _dream_lite,
    "BriaFiboPipeline": _fibo,
    "OmniGenPipeline": _omni_gen,
    "ZImageOmniPipeline": _z_image_omni,
    "BriaFibo2Pipeline": _fibo_2,
}
"""By class."""
