"""SANA: SanaTransformer2DModel, with linear attention, on the latents of a deep-compression autoencoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepdistill.families.condition import Condition
from stepdistill.families.kinds import MaskedTextFamily, TransformerFamily
from stepdistill.families.size import Size


class Sana(MaskedTextFamily):
    name = "SANA"
    pipelines = ("SanaPipeline",)
    passes = frozenset({"generator"})
    told_size = True
    encoding = (
        "clean_caption",
        "max_sequence_length",
        "complex_human_instruction",
    )  # which stands before prompts alone
    lora_targets = (*TransformerFamily.lora_targets, "ff.conv_inverted", "ff.conv_point")

    def unit(self, pipe: Any) -> int:
        return max(32, super().unit(pipe))  # written in its call

    def call(self, net: Any, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=time * net.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def encoded(self, vae: Any, images: Tensor) -> Tensor:
        latents: Tensor = vae.encode(images).latent
        return latents

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        # Binning would draw at the nearest of the sizes it was trained at, and resize that to what was asked for.
        return {**super().call_arguments(pipeline, prompts, guidance, size), "use_resolution_binning": False}
