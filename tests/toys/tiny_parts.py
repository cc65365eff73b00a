"""Parts of the tiny pipelines: autoencoders, tokenizers, text encoders, a UNet."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import diffusers

from stepdistill.system.emoji import tokenizer_folder

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet2d_condition(cross_attention_dim: int, **more: Any) -> Any:
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


def tiny_vae(shift: float | None = None, quant: bool = True, blocks: int = 3) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4, *(8,) * (blocks - 1)),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=False,
    )


def tiny_t5_tokenizer(words: tuple[str, ...] = ()) -> Any:
    """A T5 tokenizer of single letters, and of some words."""
    from transformers import T5Tokenizer

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0), *letters]
    vocabulary += [("\u2581" + word, -3.0) for word in words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def tiny_t5(width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    size: dict[str, Any] = {"d_model": width, "d_kv": 8, "num_heads": 2, "d_ff": 2 * width, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=30, feed_forward_proj="gated-gelu", **size)).eval()


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tokenizer_folder())


def clip_text_encoder(width: int, projected: bool, positions: int = 24) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=width,
        bos_token_id=2046,
        eos_token_id=2047,
        pad_token_id=2047,
        initializer_factor=2.0,
    )
    return CLIPTextModelWithProjection(config).eval() if projected else CLIPTextModel(config).eval()


def flow_euler(**more: Any) -> Any:
    """A scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def with_pag(kind: str, base: Callable[[], Any], layers: str) -> Callable[[], Any]:
    """The class with perturbed attention of a pipeline's, with the same components."""

    def made() -> Any:
        made: Any = getattr(diffusers, kind)
        parts = {k: v for k, v in base().components.items() if k in signature(made.__init__).parameters}
        return made(**parts, pag_applied_layers=layers)

    return made


def tiny_clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**size, num_attention_heads=2, projection_dim=8, image_size=32, patch_size=8)
    return CLIPVisionModel(config).eval()
