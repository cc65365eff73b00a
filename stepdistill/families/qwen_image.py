"""Qwen-Image: QwenImageTransformer2DModel on packed latents (_packing.py), with the VAE of a video model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from stepdistill.diffusion.shift import shift_of
from stepdistill.errors import UserError
from stepdistill.families._packing import PackedFamily
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size


class QwenImage(PackedFamily):
    name = "Qwen-Image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    clock = "t"
    passes = frozenset({"sigmas", "mu"})
    guidance_argument = "true_cfg_scale"
    guidance_off = 1.0
    keeps_length = True
    lora_targets = (
        *TransformerFamily.lora_targets,
        *(f"{part}.{layer}" for part in ("img_mlp", "txt_mlp") for layer in ("net.0.proj", "net.2")),
    )

    def adopt(self, pipe: Any) -> None:
        if pipe.transformer.config.guidance_embeds:
            raise UserError(
                "this QwenImagePipeline takes guidance as an input, which no Qwen-Image that was published does: only "
                "one with guidance_embeds false in its transformer's config can teach"
            )

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def shift(self, pipe: Any, tokens: int) -> float:
        # Its times are stretched once more, to end at shift_terminal with any number of steps: that is the sampler's.
        return shift_of(pipe.scheduler, tokens, stretched=True)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        length = call_default(pipe, "max_sequence_length")
        embeds, mask = pipe.encode_prompt(prompts, device=pipe.device, max_sequence_length=length)
        mask = (
            embeds.new_ones(embeds.shape[:2]) if mask is None else mask
        )  # none where prompts are equally long
        return Condition({"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[2:]
        output: Tensor = net(
            hidden_states=self.pack(x_t),
            timestep=time,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_hidden_states_mask=cond["encoder_hidden_states_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpack(output, tuple(x_t.shape[1:]))

    # A picture is the VAE's video of one frame.

    def encoded(self, vae: Any, images: Tensor) -> Tensor:
        return super().encoded(vae, images[:, :, None])[:, :, 0]

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        return super().decoded(vae, latents[:, :, None])[:, :, 0]
