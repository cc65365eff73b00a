"""What differs between families of pipelines: a table of facts, and four questions.

Everything else comes from the pipeline itself: ``encode_prompt``, ``vae``, ``scheduler.config``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import Path, TablePath, within
from stepdistill.diffusion.remembered import remembered
from stepdistill.diffusion.shift import shift_of
from stepdistill.errors import UserError
from stepdistill.families._pixels import unit_pixels
from stepdistill.families.condition import Condition
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size
from stepdistill.pictures.given import any_named, check_named, pictures_of, words_of


class Family(ABC):
    """One family of diffusers pipelines.

    A state is what the pipeline draws as noise, before it packs anything: [B, ...], whose axes its family alone knows.

    Class attributes:
        name: the family's name in messages.
        pipelines: names of the pipeline classes it serves.
        network: the pipeline's attribute that holds the network.
        clock: what the network is told for a time t of a flow path; on a table it is told the index, whatever this is.
        passes: what the pipeline's call hands to its scheduler: for its grid ``sigmas``, which are 1, 1 - 1/n ... 1/n,
            ``timesteps``, which go from 1000 to 1, ``own sigmas``, which are others still, and ``mu``; for its steps
            ``generator``, as fresh noise between them needs for a seed to give one picture, and ``negated``, which is
            the velocity, at times that count from the data.
        guidance_argument: what the call names its scale of guidance.
        guidance_off: the scale of a call that is not guided, where the network has no guidance as an input.
        has_prompts: whether conditions come from text prompts.
        any_size: whether its call takes a height and a width.
        told_size: whether the call is told them even where they are the network's own, as its default is another.
        size_conditions: names of the conditions that say the size of what is drawn.
        from_picture: whether it draws from a picture beside the prompt, which names it, see ``pictures.given``; of such
            prompts one is drawn at a time.
        picture_optional: whether it also draws from prompts that name none.
        video: whether a state has frames, and its VAE takes [B, 3, F, H, W].
        keeps_length: whether a guided output is given the length, along the last axis of what :meth:`pack` makes of
            it, of the output for the prompt alone.
        alone: whether prompts are drawn one at a time, as a call of several has no mask for what pads them to the
            longest, or gives their fresh noise no generator of its own.
        lora_targets: suffixes of the layers that carry LoRA.
        freezable: levels of ``student.freeze``, by name: a regular expression of the names of parameters that stay.
        picture_tokens: which of the outputs of a block of several kinds of tokens are the picture's.
        changes: what methods may change in its network.
        differentiable: whether :meth:`to_frames` has a graph to the states.
        remark: what the user is told of it at the start of a run.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    network: ClassVar[str] = "transformer"
    clock: ClassVar[Literal["1000 t", "t"]] = "1000 t"
    passes: ClassVar[frozenset[str]] = frozenset()
    guidance_argument: ClassVar[str] = "guidance_scale"
    guidance_off: ClassVar[float] = 0.0
    has_prompts: ClassVar[bool] = True
    any_size: ClassVar[bool] = True
    told_size: ClassVar[bool] = False
    size_conditions: ClassVar[frozenset[str]] = frozenset()
    from_picture: ClassVar[bool] = False
    picture_optional: ClassVar[bool] = False
    video: ClassVar[bool] = False
    keeps_length: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]]
    freezable: ClassVar[Mapping[str, str]] = {}
    picture_tokens: ClassVar[int] = -1
    changes: ClassVar[NetworkChanges] = NetworkChanges()
    differentiable: ClassVar[bool] = True
    remark: ClassVar[str] = ""

    # The four questions.

    @abstractmethod
    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        """The shape of one state, without B, of pictures of a size that :meth:`check_size` lets pass."""

    @abstractmethod
    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        """The conditions of the prompts, through the pipeline's own encoder, on the pipeline's device; with the size of
        what is drawn, where the network is told of it."""

    @abstractmethod
    def null(self, pipe: Any, size: Size) -> Condition | None:
        """The condition (B = 1) that classifier-free guidance starts from; None where the model has none."""

    def unguided(self, null: Condition, cond: Condition) -> Condition:
        """What guidance starts from for the samples of a condition: :meth:`null`, at the size that these say."""
        told = {name: cond[name][:1] for name in self.size_conditions & null.tensors.keys()}
        return Condition({**null.tensors, **told})

    @abstractmethod
    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The network's raw output, shaped as the states x_t [B, ...], at its own time [B]."""

    # Where a discriminator looks.

    @abstractmethod
    def features_of(self, net: nn.Module) -> nn.Module:
        """The module whose output is the network's inner picture of x_t, read by a discriminator head."""

    @abstractmethod
    def feature_shape(self, net: nn.Module, state: tuple[int, ...]) -> tuple[int, int, int]:
        """(D, h, w) of those features for states of this shape: their channels, and the map they form, also as the
        tokens of a transformer; the frames of a video lie below one another."""

    def picture(self, net: nn.Module, output: Any, state: tuple[int, ...]) -> Tensor:
        """What belongs to the picture in the output of that module, for states of this shape."""
        picture: Tensor = output[self.picture_tokens] if isinstance(output, tuple) else output
        return picture

    def feature_layers(self, net: nn.Module) -> list[nn.Module]:
        """The modules that the heads of a discriminator at several depths read, in the order in which they run."""
        return [self.features_of(net)]

    def layer_shapes(self, net: nn.Module, state: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(D, h, w) of the features of each of those modules."""
        return [self.feature_shape(net, state)] * len(self.feature_layers(net))

    # What most families keep.

    def adopt(self, pipe: Any) -> None:
        """Readies a pipeline that becomes a teacher; what it draws stays the same."""
        return None

    def stretches(self, pipe: Any) -> dict[str, float]:
        """The pipeline's attributes that hold its networks, each with the network's own time from which on up it is
        called, descending to 0; most have one."""
        return {self.network: 0.0}

    def put(self, pipe: Any, networks: Sequence[nn.Module], starts: Sequence[float]) -> bool:
        """Gives a pipeline its student's networks, with their starts as :meth:`stretches` has them; false where its
        call cannot switch between so many."""
        if len(networks) == 1:
            pipe.register_modules(**{self.network: networks[0]})
        return len(networks) == 1

    def default_size(self, pipe: Any) -> Size:
        """What the pipeline draws where its call says nothing."""
        size = getattr(pipe, self.network).config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return Size(int(height) * self.pixels(pipe), int(width) * self.pixels(pipe))

    def pixels(self, pipe: Any) -> int:
        """Pixels, along a side, that one value of a state stands for."""
        return int(pipe.vae_scale_factor)

    def unit(self, pipe: Any) -> int:
        """Of what the sides in pixels must be multiples."""
        return self.pixels(pipe)

    def check_size(self, pipe: Any, size: Size) -> None:
        """Refuses what the pipeline would not draw, or would round.

        Raises:
            UserError: saying which sizes there are.
        """
        name, unit = type(pipe).__name__, self.unit(pipe)
        if not self.any_size and size != (own := self.default_size(pipe)):
            raise UserError(f"data.size is {size}, but {name} draws {own} alone: leave it out")
        if size.height % unit or size.width % unit or min(size.height, size.width) < unit:
            raise UserError(
                f"data.size is {size}, but {name} draws sides that are multiples of {unit} pixels"
            )
        if size.frames != 1 and not self.video:
            raise UserError(
                f"data.size asks for {size.frames} frames, but {name} draws pictures: leave them out"
            )

    def tokens(self, net: Any, state: tuple[int, ...]) -> int:
        """Tokens of a picture, by which a dynamic time shift goes."""
        return state[-1] * state[-2]

    def drawn_tokens(self, pipe: Any, size: Size) -> int:
        """Tokens of a picture of this size."""
        return self.tokens(getattr(pipe, self.network), self.state_shape(pipe, size))

    def shift(self, pipe: Any, tokens: int) -> float:
        """The shift of a flow teacher's times for pictures of so many tokens, see :func:`shift_of`."""
        return shift_of(pipe.scheduler, tokens)

    def clock_shift(self, pipe: Any, tokens: int) -> float:
        """The shift between the network's own clock and t, see :class:`FlowPath`."""
        return 1.0

    @remembered
    def time(self, path: Path, t: Tensor) -> Tensor:
        """The network's own time for t [B]: the (fractional) index of a discrete table, or ``clock`` on a flow path."""
        if isinstance(path, TablePath):
            # 0.75 in float32 times 1000 must be timestep 749, the very number diffusers' scheduler passes.
            return within(path.position(t, 1e-3) - 1, 0, path.steps - 1).float()
        return t.float() * 1000 if self.clock == "1000 t" else t.float()

    def pack(self, x_t: Tensor) -> Tensor:
        """States [B, ...] as the pipeline's scheduler sees them."""
        return x_t

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        """The inverse, to states of this shape, without B."""
        return packed

    def scheduled(self, pipe: Any, x_t: Tensor, size: Size) -> list[Tensor]:
        """What each of a pipeline's schedulers sees of states [B, ...]; most have one, which sees all."""
        return [self.pack(x_t)]

    def unscheduled(self, pipe: Any, parts: list[Tensor], size: Size) -> Tensor:
        """The inverse."""
        return self.unpack(parts[0], self.state_shape(pipe, size))

    def encoded(self, vae: Any, images: Tensor) -> Tensor:
        """The latents of images [B, 3, H, W], or videos [B, 3, F, H, W], in [-1, 1]: the mode of the posterior."""
        latents: Tensor = vae.encode(images).latent_dist.mode()
        return latents

    def decoded(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        images: Tensor = vae.decode(latents, return_dict=False)[0]
        return images

    def normalised(self, vae: Any, latents: Tensor) -> Tensor:
        """The VAE's latents [B, C, ...] as states: shifted, scaled."""
        shift, scale = affine(vae.config, latents)
        return (latents - shift) * scale

    def denormalised(self, vae: Any, states: Tensor) -> Tensor:
        """The inverse."""
        shift, scale = affine(vae.config, states)
        return states / scale + shift

    def examples_refused(self, pipe: Any) -> str | None:
        """Why images or videos cannot be made states; None where they can."""
        return None

    def to_states(self, pipe: Any, frames: Tensor) -> Tensor:
        """Frames [B, F, 3, H, W] in [-1, 1] to states."""
        images = frames.transpose(1, 2) if self.video else frames[:, 0]
        with torch.autocast(images.device.type, enabled=False):
            latents = self.encoded(pipe.vae, images.to(pipe.vae.dtype)).float()
        return self.normalised(pipe.vae, latents)

    def decoded_part(self, pipe: Any, states: Tensor, size: Size) -> Tensor:
        """What of states [B, ...] is decoded to pictures of a size."""
        return states

    def by_frame(self, pipe: Any, states: Tensor, size: Size) -> Tensor | None:
        """What of states [B, ...] is decoded, frame after frame, [B, F, C, H, W]; None of pictures, and where it is not
        known which axis is time."""
        part = self.decoded_part(pipe, states, size)
        return part.transpose(1, 2) if self.video and part.ndim == 5 else None

    def to_frames(self, pipe: Any, x0: Tensor) -> Tensor:
        """The inverse: clean states to frames [B, F, 3, H, W] in [0, 1]; F is 1 for pictures. What a VAE decodes of
        transparency is left out."""
        with torch.autocast(x0.device.type, enabled=False):
            images = self.decoded(pipe.vae, self.denormalised(pipe.vae, x0).to(pipe.vae.dtype))
        frames = images.transpose(1, 2) if self.video else images[:, None]
        return unit_pixels(frames[:, :, :3])

    def student_pipeline(self, pipe: Any, net: nn.Module) -> str | None:
        """Class that a student's pipeline is saved as, of parts of the teacher's and its network; None keeps the
        teacher's."""
        return None

    def call_prompts(self, pipe: Any, prompts: list[str]) -> list[str]:
        """The prompts as :meth:`call_arguments` takes them: class names that the pipeline knows as their numbers."""
        return prompts

    def check_prompts(self, pipeline: str, prompts: Sequence[str], what: str = "data.prompts") -> None:
        """Refuses prompts that name no picture where its pipeline (of the class ``pipeline``) draws from one, or the
        other way round.

        Raises:
            UserError: for the first of them, which ``what`` asks for.
        """
        check_named(prompts, self.from_picture, pipeline, what, optional=self.picture_optional)

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        """Arguments with which a student's pipeline (of the class ``pipeline``) draws these prompts.

        Args:
            pipeline: the class's name.
            prompts: as :meth:`call_prompts` spells them.
            guidance: the scale that a network with guidance as an input is given; None switches guidance off.
            size: what is drawn; None is what the pipeline draws by itself.
        """
        scale = self.guidance_off if guidance is None else guidance
        sides = {"height": size.height, "width": size.width} if size else {}
        frames = {"num_frames": size.frames} if size and self.video else {}
        asked: dict[str, Any] = {"prompt": prompts}
        if self.from_picture and (any_named(prompts) or not self.picture_optional):
            assert size is not None, "such a family is told its size"
            pictures = pictures_of(prompts, size.height, size.width)
            asked = {"prompt": words_of(prompts), "image": pictures if len(pictures) > 1 else pictures[0]}
        return {**asked, self.guidance_argument: scale, **sides, **frames}

    def own_arguments(self, pipe: Any) -> dict[str, Any]:
        """What a call of this very pipeline must be told, as its class's defaults are not what its network takes."""
        return {}

    def grid_arguments(self, steps: int) -> dict[str, Any]:
        """What a call of so many steps must be told beside their number."""
        return {}


def call_default(pipe: Any, name: str) -> Any:
    """What an argument of the pipeline's call is where it is left out."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def affine(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale from a VAE's latents to states [B, C, ...]: by channel where the config states both moments."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    scale = like.new_tensor(config.get("scaling_factor") or 1.0)
    if mean is None or deviation is None:
        return like.new_tensor(config.get("shift_factor") or 0.0), scale
    channels = (1, -1) + (1,) * (like.ndim - 2)
    return like.new_tensor(mean).view(channels), scale / like.new_tensor(deviation).view(channels)
