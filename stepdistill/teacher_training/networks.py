"""The networks of the teacher at a given size, all of stock classes of diffusers and transformers."""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from stepdistill.teacher_training.settings import TeacherSettings

IMAGE_SIZE, LATENT_SIZE = 32, 8


def build_vae(settings: TeacherSettings) -> AutoencoderKL:
    """32x32 RGB in [-1, 1] to latents [B, C, 8, 8]."""
    widths = settings.vae_channels
    made: AutoencoderKL = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        latent_channels=settings.latent_channels,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    return made


def build_clip(settings: TeacherSettings, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Text and image towers with a common space of ``settings.projection`` dimensions."""
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": settings.tokens,
        "hidden_size": settings.text_width,
        "intermediate_size": 4 * settings.text_width,
        "num_hidden_layers": settings.text_layers,
        "num_attention_heads": 4,
        "projection_dim": settings.projection,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "hidden_size": settings.vision_width,
        "intermediate_size": 4 * settings.vision_width,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": 4,
        "projection_dim": settings.projection,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.projection))


def text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text tower as the encoder of a StableDiffusionPipeline (a copy, on the CPU)."""
    encoder: CLIPTextModel = CLIPTextModel(_text_config(clip))
    encoder.load_state_dict(clip.text_model.state_dict())
    encoder.eval()
    return encoder


def text_encoder_with_projection(clip: CLIPModel) -> CLIPTextModelWithProjection:
    """CLIP's text tower and projection as an encoder of a StableDiffusion3Pipeline (a copy, on the CPU)."""
    encoder: CLIPTextModelWithProjection = CLIPTextModelWithProjection(_text_config(clip))
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    encoder.eval()
    return encoder


def silent_t5(settings: TeacherSettings, tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """A T5 encoder that says nothing: its last norm has weight zero, so that its states are the zeros that a
    StableDiffusion3Pipeline uses where it has no T5. With it the folder loads without extra arguments."""
    encoder: T5EncoderModel = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * settings.text_width,
            d_kv=8,
            d_ff=8,
            num_layers=1,
            num_heads=1,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    for parameter in encoder.parameters():
        parameter.data.zero_()
    encoder.eval()
    return encoder


def _text_config(clip: CLIPModel) -> CLIPTextConfig:
    return CLIPTextConfig(**clip.config.to_dict()["text_config"])


def build_unet(settings: TeacherSettings) -> UNet2DConditionModel:
    """Predicts the noise in latents [B, C, 8, 8]; attends to the caption at 4x4."""
    made: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=settings.unet_channels,
        layers_per_block=settings.unet_layers,
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,  # in this class the number of heads
        norm_num_groups=16,
    )
    return made


def build_transformer(settings: TeacherSettings) -> SD3Transformer2DModel:
    """Predicts the velocity of latents [B, C, 8, 8], one token a latent pixel. The pipeline joins the two
    encoders' (here the same encoder's) hidden states and pooled projections along the feature axis: hence
    twice their widths."""
    made: SD3Transformer2DModel = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        num_layers=settings.flow_layers,
        attention_head_dim=settings.flow_width // 4,
        num_attention_heads=4,
        joint_attention_dim=2 * settings.text_width,
        caption_projection_dim=settings.flow_width,
        pooled_projection_dim=2 * settings.projection,
        pos_embed_max_size=LATENT_SIZE,
    )
    return made


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas; n steps at 1000 (n - i) / n - 1, so that one step starts from pure noise."""
    made: DDIMScheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        steps_offset=1,  # has no effect on this spacing; diffusers warns without it
        clip_sample=False,
        prediction_type="epsilon",
    )
    return made
