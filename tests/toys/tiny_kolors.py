"""A tiny random Kolors pipeline, whose tokenizer needs sentencepiece."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from tiny_parts import BETAS, tiny_vae, unet2d_condition


def tiny_kolors(folder: Path) -> Any:
    """A pipeline with random weights, whose tokenizer lies in the folder: of single letters."""
    import sentencepiece
    from diffusers import EulerDiscreteScheduler, KolorsPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    letters = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefghijklm nopqrstuvwxyz", "a red heart", "blue fish"]),
        model_writer=letters,
        model_type="char",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(letters.getvalue())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = ChatGLMModel(
            ChatGLMConfig(
                num_layers=2,
                padded_vocab_size=64,
                hidden_size=16,
                ffn_hidden_size=16,
                kv_channels=8,
                num_attention_heads=2,
                seq_length=256,
                add_qkv_bias=True,
                multi_query_attention=True,
                multi_query_group_num=1,
                original_rope=True,
            )
        )
        for value in text_encoder.parameters():  # it is made without any
            torch.nn.init.normal_(value, std=0.5)
        pipe = KolorsPipeline(
            vae=tiny_vae(),
            text_encoder=text_encoder.eval(),
            tokenizer=ChatGLMTokenizer(str(folder / "tokenizer.model")),
            unet=unet2d_condition(
                cross_attention_dim=16,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16 + 6 * 8,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=BETAS["beta_start"],
                beta_end=0.014,
                beta_schedule="scaled_linear",
                num_train_timesteps=1100,
                timestep_spacing="trailing",
            ),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
