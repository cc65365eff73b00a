"""PixArt-Sigma: a family of one's own. Its transformer works on latents, and returns eps and a variance."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stepdistill.extend import Condition, Size, TransformerFamily


class PixArtSigma(TransformerFamily):
    name = "PixArt-Sigma"
    pipelines = ("PixArtSigmaPipeline",)
    passes = frozenset({"generator"})  # to its scheduler's step

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # With the defaults of the pipeline's call, which are not those of encode_prompt.
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts, False, device=pipe.device, clean_caption=True, max_sequence_length=300
        )
        return Condition({"embeds": embeds, "text_mask": mask})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            encoder_hidden_states=cond["embeds"],
            encoder_attention_mask=cond["text_mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        # Binning would draw at the nearest of the sizes it was trained at, and cut out what was asked for.
        return {**super().call_arguments(pipeline, prompts, guidance, size), "use_resolution_binning": False}
