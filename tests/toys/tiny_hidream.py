"""A tiny random HiDream pipeline: two CLIP encoders, a T5 and a Llama, and a transformer with experts."""

from __future__ import annotations

from typing import Any

import torch
from tiny_more import _qwen, qwen_tokenizer
from tiny_parts import clip_text_encoder, clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


def tiny_hidream() -> Any:
    """A pipeline with random weights, the same at every call; it draws 128 x 128."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HiDreamImagePipeline,
        HiDreamImageTransformer2DModel,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = HiDreamImageTransformer2DModel(
            patch_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=32,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(128, 128),
            llama_layers=[0, 1],
        )
        for value in transformer.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.2)
        pipe = HiDreamImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(shift=0.1, quant=False, blocks=1),
            text_encoder=clip_text_encoder(16, projected=True, positions=128),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text_encoder(16, projected=True, positions=128),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=tiny_t5(16),
            tokenizer_3=tiny_t5_tokenizer(),
            text_encoder_4=LlamaForCausalLM(
                LlamaConfig(**_qwen(layers=2), attn_implementation="eager")
            ).eval(),
            tokenizer_4=qwen_tokenizer(),
            transformer=transformer.eval(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
