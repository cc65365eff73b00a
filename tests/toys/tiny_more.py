"""Tiny pipelines of further transformer families, see tiny.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from tiny_parts import BETAS, clip_text_encoder, clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


def _pixart(alpha: bool = True) -> Any:
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=128 if alpha else 8,  # of alpha's sizes, the one whose network is told what is drawn
        patch_size=2,
        cross_attention_dim=24,
        caption_channels=16,
        norm_num_groups=4,
        use_additional_conditions=None if alpha else False,
    )
    _drawn(transformer)
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        transformer=transformer,
        vae=tiny_vae(),
        scheduler=DPMSolverMultistepScheduler(**BETAS),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )


def _pixart_sigma() -> Any:
    return _pixart(alpha=False)


def _aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    _drawn(transformer)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    size: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    return AuraFlowPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=tiny_vae(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=30, **size)).eval(),
        tokenizer=tiny_t5_tokenizer(),
    )


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.4, 0.9],
        latents_std=[2.8, 1.4, 0.9, 1.7],
    )
    return QwenImagePipeline(
        transformer=transformer,
        # As it is published, but for the length of its longest picture.
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_vl(**tokens: int) -> Any:
    """A Qwen2.5-VL with these ids of special tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={**_qwen(layers=1), "rope_scaling": rope}, vision_config=vision, **tokens
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        rope_theta=256.0,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    _drawn(transformer)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=Qwen3Model(Qwen3Config(**_qwen(layers=2), head_dim=8)).eval(),
        tokenizer=qwen_tokenizer(),
    )


def _sana(sprint: bool = False) -> Any:
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )
    from transformers import Gemma2Config, Gemma2Model

    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        timestep_scale=0.7,
        **({"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}),
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    )
    if sprint:
        _drawn(transformer.time_embed)
    return (SanaSprintPipeline if sprint else SanaPipeline)(
        transformer=transformer,
        scheduler=SCMScheduler(sigma_data=0.5) if sprint else FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Gemma2Model(Gemma2Config(**GEMMA)).eval(),
        tokenizer=_gemma_tokenizer(),
    )


def _sana_sprint() -> Any:
    return _sana(sprint=True)


def _klein() -> Any:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # Its prompts are what the layers 9, 18 and 27 say.
    encoder = Qwen3ForCausalLM(Qwen3Config(**_qwen(layers=27, width=8), head_dim=4)).eval()
    return Flux2KleinPipeline(
        **_flux_2(guidance_embeds=False), text_encoder=encoder, tokenizer=qwen_tokenizer()
    )


def _flux_2_dev() -> Any:
    from diffusers import Flux2Pipeline
    from transformers import MistralConfig, MistralModel

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT.replace("m['content']", "m['content'][0]['text']")
    # Of its layers 10, 20 and 30.
    encoder = MistralModel(MistralConfig(**_qwen(layers=30, width=8), head_dim=4)).eval()
    return Flux2Pipeline(**_flux_2(guidance_embeds=True), text_encoder=encoder, tokenizer=tokenizer)


def _flux_2(guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Transformer2DModel,
    )

    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    _drawn(transformer)
    vae = AutoencoderKLFlux2(
        sample_size=32,
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_(0.0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
    }


def _ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=True,
        patch_size=2,
        patch_size_t=1,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    return LTXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )


def _hunyuan_video() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 2, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    # Of the tokens of its template it drops the first 95: no more than these may stand before the prompt.
    words = tuple(dict.fromkeys(re.findall("[A-Za-z]+", DEFAULT_PROMPT_TEMPLATE["template"])))
    config = LlamaConfig(
        vocab_size=30 + len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return HunyuanVideoPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=LlamaModel(config).eval(),
        tokenizer=tiny_t5_tokenizer(words),
        text_encoder_2=clip_text_encoder(16, projected=False, positions=77),
        tokenizer_2=clip_tokenizer(),
    )


def _cog_video_x(**more: Any) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=2,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        **{"max_text_seq_length": 226, "use_rotary_positional_embeddings": True, **more},
    )
    vae = AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.5,
    )
    return CogVideoXPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            clip_sample=False,
        ),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )


def _cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    _drawn(transformer)
    torch.nn.init.normal_(
        transformer.patch_embed.text_proj.weight, std=0.8
    )  # or prompts are hardly told apart
    tokenizer = tiny_t5_tokenizer()  # one that leaves no prompt empty, as its own
    tokenizer.padding_side = "left"
    config = GlmConfig(**_qwen(layers=2), head_dim=8, pad_token_id=0)
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
        vae=tiny_vae(),
        text_encoder=GlmModel(config).eval(),
        tokenizer=tokenizer,
    )


def _lumina2() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    _drawn(transformer)
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(shift=0.1, quant=False, blocks=4),
        text_encoder=Gemma2Model(Gemma2Config(**GEMMA)).eval(),
        tokenizer=_gemma_tokenizer(),
    )


def _hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    transformer = HunyuanDiT2DModel(
        sample_size=4,
        num_layers=4,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        mlp_ratio=2.0,
        use_style_cond_and_image_meta_size=True,
    )
    _drawn(transformer)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=77,
    )
    return HunyuanDiTPipeline(
        transformer=transformer,
        vae=tiny_vae(blocks=4),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
        ),
        text_encoder=BertModel(config).eval(),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77),
        text_encoder_2=tiny_t5(16),
        tokenizer_2=tiny_t5_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
    for value in transformer.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.2)
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift=0.1, quant=False),
        text_encoder=tiny_t5(16),
        tokenizer=tiny_t5_tokenizer(),
    )


def _cog_video_x_1_5() -> Any:
    return _cog_video_x(patch_size_t=2, patch_bias=False)


def cog_video_x_of_short_prompts() -> Any:
    """With learnt places for 16 tokens of a prompt, where its class's call has 226."""
    return _cog_video_x(max_text_seq_length=16, use_rotary_positional_embeddings=False)


def _kandinsky5(visual_cond: bool = False) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Kandinsky5T2VPipeline,
        Kandinsky5Transformer3DModel,
    )

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        visual_cond=visual_cond,
    )
    _drawn(transformer)
    pipe = Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=_hunyuan_video().vae,
        text_encoder=_qwen_image().text_encoder,
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip_text_encoder(16, projected=False, positions=77),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    # Of the tokens of its template it drops the first 128: no more than these may stand before the prompt.
    words = tuple(dict.fromkeys(re.findall("[A-Za-z]+", pipe.prompt_template)))
    pipe.register_modules(tokenizer=tiny_t5_tokenizer(words))
    return pipe


def _text_to_video() -> Any:
    import diffusers

    unet = diffusers.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    return diffusers.TextToVideoSDPipeline(
        vae=tiny_vae(),
        text_encoder=clip_text_encoder(16, projected=False),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


def kandinsky5_beside_a_picture() -> Any:
    """With the channels in which its network can be given a picture to start from, as it is published."""
    return _kandinsky5(visual_cond=True)


BUILDERS: dict[str, Callable[[], Any]] = {
    "pixart-alpha": _pixart,
    "pixart-sigma": _pixart_sigma,
    "aura-flow": _aura_flow,
    "qwen-image": _qwen_image,
    "z-image": _z_image,
    "sana": _sana,
    "sana-sprint": _sana_sprint,
    "klein": _klein,
    "ltx": _ltx,
    "hunyuan-video": _hunyuan_video,
    "cog-video-x": _cog_video_x,
    "cog-video-x-1.5": _cog_video_x_1_5,
    "cogview4": _cogview4,
    "lumina2": _lumina2,
    "hunyuan-dit": _hunyuan_dit,
    "chroma": _chroma,
    "flux-2": _flux_2_dev,
    "kandinsky5": _kandinsky5,
    "text-to-video": _text_to_video,
}

GEMMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""Sizes of a Gemma text model."""


def _drawn(network: torch.nn.Module) -> None:
    """Draws all weights at random: of some networks there are that start at zero, or that hardly hear the prompt."""
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.2)


def _qwen(layers: int, width: int = 16) -> dict[str, Any]:
    """Sizes of a Qwen text model."""
    return {
        "vocab_size": 264,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
    }


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(*more: str) -> Any:
    """A Qwen tokenizer of single bytes, and of more special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=special[1:], model_max_length=2048
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def _gemma_tokenizer() -> Any:
    """A Gemma tokenizer of single letters."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=2048
    )
