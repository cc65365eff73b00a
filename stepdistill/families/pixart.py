"""PixArt-alpha and PixArt-Sigma: PixArtTransformer2DModel on latents, with an eps and a variance as its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import TransformerFamily
from stepdistill.families.size import Size
from stepdistill.system.log import say


def _can_clean() -> bool:
    """Whether what diffusers cleans prompts with is installed."""
    from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())


class PixArt(TransformerFamily):
    name = "PixArt-alpha, PixArt-Sigma"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    passes = frozenset({"generator"})
    size_conditions = frozenset({"resolution", "aspect_ratio"})

    def adopt(self, pipe: Any) -> None:
        if call_default(pipe, "clean_caption") and not _can_clean():
            say(
                f"{type(pipe).__name__} cleans its prompts with beautifulsoup4 and ftfy, which are not installed: they "
                "are taken as they stand"
            )

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        own = {name: call_default(pipe, name) for name in ("clean_caption", "max_sequence_length")}
        own["clean_caption"] = own["clean_caption"] and _can_clean()  # or diffusers warns at every call
        embeds, mask, _, _ = pipe.encode_prompt(prompts, False, device=pipe.device, **own)
        tensors = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        if type(pipe).__name__ == "PixArtAlphaPipeline" and pipe.transformer.config.sample_size == 128:
            ones = embeds.new_ones(len(embeds), 1)
            tensors["resolution"] = ones * torch.tensor([size.height, size.width]).to(ones)
            tensors["aspect_ratio"] = ones * (size.height / size.width)
        return Condition(tensors)

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        output: Tensor = net(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=time,
            added_cond_kwargs={name: cond.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        # Binning would draw at the nearest of the sizes it was trained at, and resize that to what was asked for.
        return {**super().call_arguments(pipeline, prompts, guidance, size), "use_resolution_binning": False}
