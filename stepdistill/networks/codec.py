"""Codec: prompts and pictures to what networks work on, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from stepdistill.families.base import Family
from stepdistill.families.condition import Condition, joined
from stepdistill.families.size import Size
from stepdistill.networks.streamed import device_of

TEXT_ENCODER = ("text_encoder", "image_encoder")
"""How the names of a pipeline's encoders of prompts begin, and of the pictures that these name."""

Part = Literal["text", "vae"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Codec:
    """A pipeline without its denoiser.

    Attributes:
        pipe: the pipeline.
        family: how it is called.
        size: what is drawn.
        device: where its networks work.
    """

    pipe: Any
    family: Family
    size: Size
    device: torch.device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state, without B."""
        return self.family.state_shape(self.pipe, self.size)

    @property
    def told_size(self) -> Size | None:
        """The size that the pipeline's call must be told; None where it draws it by itself."""
        own = self.size == self.family.default_size(self.pipe) and not self.family.told_size
        return None if own else self.size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditions of the prompts, through the pipeline's own encoder."""
        return self._in_place(lambda: self.family.encode(self.pipe, list(prompts), self.size))

    @torch.no_grad()
    def null(self) -> Condition | None:
        """The condition (B = 1) that classifier-free guidance starts from; None where the model has none."""
        return self._in_place(lambda: self.family.null(self.pipe, self.size))

    @torch.no_grad()
    def to_states(self, frames: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] in [-1, 1] to clean states [B, ...]."""
        return self._in_place(lambda: self.family.to_states(self.pipe, frames), texts=False)

    def to_frames(self, states: Tensor) -> Tensor:
        """Clean states [B, ...] to frames [B, F, 3, H, W] in [0, 1], F = 1 for pictures; with a graph to the states,
        where they have one."""
        states = self.family.decoded_part(self.pipe, states, self.size)
        # A decoding without a graph is a draw, of all the pipeline.
        texts = not self.family.differentiable
        return self._in_place(lambda: self.family.to_frames(self.pipe, states), texts)

    def by_frame(self, states: Tensor) -> Tensor | None:
        """What of states [B, ...] is decoded, frame after frame, [B, F, C, H, W]; None of pictures, and where it
        is not known which axis is time."""
        return self.family.by_frame(self.pipe, states, self.size)

    def fresh_noise(self, travelling: ModuleType, start: Tensor) -> Callable[[int], Tensor]:
        """The noise [B, ...] that follows each network call of a draw from this start, counted from 0, as schedulers
        that travel draw it.

        Args:
            travelling: the module of one of them.
            start: the noise [B, ...] that the draw starts from.
        """
        seen = self.family.scheduled(self.pipe, start, self.size)
        keys = [travelling.keys_of(part) for part in seen]

        def after(call: int) -> Tensor:
            noises = [travelling.noise_after(own, call, part) for own, part in zip(keys, seen, strict=True)]
            return self.family.unscheduled(self.pipe, noises, self.size)

        return after

    def release(self, *parts: Part) -> None:
        """Moves text encoders or the VAE off the device; what needs them brings them back for as long as it takes."""
        for name, network in self._networks().items():
            if ("text" in parts and name.startswith(TEXT_ENCODER)) or ("vae" in parts and name == "vae"):
                network.to("cpu")

    def _networks(self) -> dict[str, nn.Module]:
        found: dict[str, Any] = self.pipe.components
        return {name: part for name, part in found.items() if isinstance(part, nn.Module)}

    def _in_place(self, work: Callable[[], Result], texts: bool = True) -> Result:
        """What ``work`` returns, with every network of the pipeline on the device while it runs, but for text encoders
        where it needs none: those of large models would be moved at every picture."""
        wanted = [
            part for name, part in self._networks().items() if texts or not name.startswith(TEXT_ENCODER)
        ]
        away = [part for part in wanted if device_of(part).type != self.device.type]
        for part in away:
            part.to(self.device)
        try:
            return work()
        finally:
            for part in away:
                part.to("cpu")


@dataclass(frozen=True)
class Encoded(Codec):
    """A codec that has encoded some prompts already: text encoders do not come to the device for each picture.

    Attributes:
        known: conditions (B = 1) of those prompts.
    """

    known: Mapping[str, Condition]

    @staticmethod
    def of(codec: Codec, prompts: Sequence[str], batch: int = 16) -> Encoded:
        """The codec, with these prompts encoded, ``batch`` at a time."""
        texts, known = list(dict.fromkeys(prompts)), dict[str, Condition]()

        def encode() -> None:
            for first in range(0, len(texts), batch):
                some = texts[first : first + batch]
                found = codec.family.encode(codec.pipe, some, codec.size)
                known.update((text, found.rows(slice(i, i + 1))) for i, text in enumerate(some))

        with torch.no_grad():
            codec._in_place(encode)
        return Encoded(codec.pipe, codec.family, codec.size, codec.device, known)

    def encode(self, prompts: Sequence[str]) -> Condition:
        return joined([self.known[prompt] for prompt in prompts])
