"""Wan 2.1 and 2.2: WanTransformer3DModel on video latents; of Wan 2.2 A14B two, for high and for low noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._any_step import PIPELINE, WanChanges, call_any_step, is_any_step
from stepdistill.families.base import call_default
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import VideoFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size


class Wan(VideoFamily):
    name = "Wan 2.1, Wan 2.2"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", PIPELINE)
    changes: ClassVar[NetworkChanges] = WanChanges()
    blocks = "blocks"
    lora_targets = (*VideoFamily.lora_targets, "ffn.net.0.proj", "ffn.net.2")

    def adopt(self, pipe: Any) -> None:
        second, ratio = getattr(pipe, "transformer_2", None), pipe.config.get("boundary_ratio")
        if pipe.transformer is None or (second is None and ratio is not None):
            missing = "transformer" if pipe.transformer is None else "transformer_2"
            raise UserError(
                f"this {type(pipe).__name__} has no {missing}, which it calls in a stretch of noise: load it with both "
                "networks"
            )

    def stretches(self, pipe: Any) -> dict[str, float]:
        ratio = pipe.config.get("boundary_ratio")  # without one, its call uses the first alone
        if ratio is None:
            return {"transformer": 0.0}
        return {"transformer": ratio * pipe.scheduler.config.num_train_timesteps, "transformer_2": 0.0}

    def put(self, pipe: Any, networks: Sequence[nn.Module], starts: Sequence[float]) -> bool:
        if len(networks) > 2:
            return False
        second, ratio = None, None
        if len(networks) == 2:
            second, ratio = networks[1], round(starts[0] / pipe.scheduler.config.num_train_timesteps, 6)
        pipe.register_modules(transformer=networks[0], transformer_2=second)
        pipe.register_to_config(boundary_ratio=ratio)
        return True

    def student_pipeline(self, pipe: Any, net: nn.Module) -> str | None:
        return PIPELINE if is_any_step(net) and type(pipe).__name__ != PIPELINE else None

    def pixels(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_spatial)

    def patch(self, net: Any) -> int:
        return int(net.config.patch_size[1])

    def stride(self, pipe: Any) -> int:
        return int(pipe.vae_scale_factor_temporal)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        # Zeros up to the length of the call's default, without a mask, as the network was trained.
        length = call_default(pipe, "max_sequence_length")
        embeds, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=length, device=pipe.device)
        return Condition({"encoder_hidden_states": embeds})

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return self.encode(pipe, [""], size)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        if is_any_step(net):
            return call_any_step(net, x_t, time, cond)
        # Wan 2.2's pipeline tells every token its time, which is one for all but where a picture is given.
        embeds = cond["encoder_hidden_states"]
        output: Tensor = net(
            hidden_states=x_t, timestep=time, encoder_hidden_states=embeds, return_dict=False
        )[0]
        return output
