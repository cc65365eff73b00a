"""A tiny random pipeline of a real class that no family serves."""

from __future__ import annotations

from typing import Any

import torch
from tiny_parts import tiny_t5, tiny_t5_tokenizer, tiny_vae
from torch import nn


def chroma() -> Any:
    """The same at every call; its network's matrices are drawn anew, as some start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = _chroma()
        for value in pipe.transformer.parameters():
            if value.ndim > 1:
                nn.init.normal_(value, std=0.2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )
