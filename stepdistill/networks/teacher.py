"""PipelineTeacher: a diffusers pipeline of a known family, or one that was recorded, as a frozen model on a path."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepdistill.diffusion.guidance import extrapolate, in_interval, rescaled, with_length_of
from stepdistill.diffusion.path import FlowPath, Path, Prediction, per_sample
from stepdistill.errors import UserError
from stepdistill.families import known_family
from stepdistill.families._classes import check_class
from stepdistill.families._guiders import switched_off
from stepdistill.families._recording import record
from stepdistill.families.base import Family
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.size import Size
from stepdistill.networks.codec import Codec
from stepdistill.networks.denoiser import Denoiser, in_bfloat16
from stepdistill.networks.fingerprint import weights_hash
from stepdistill.networks.loading import with_merged_adapters, without_filters
from stepdistill.networks.offloading import check_unmoved
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.switched import SwitchedNetworks, network_of, networks_in


class PipelineTeacher:
    """A diffusers pipeline as a frozen teacher: with its own adapters merged, and without what alters its pictures.

    Args:
        pipe: the pipeline; a VAE in half precision is replaced by a float32 copy.
        device: where its networks go.
        family: how the pipeline is called; found by its class when not given, or recorded.
        guidance_interval: times at which guidance is on.
        guidance_rescale: how far guided outputs are drawn to the deviation of those that are not guided.
        shift: of the times, for a flow model; None takes its scheduler's own.
        guidance: the recipe's scale; for a network that takes it as an input, that of the copies that are trained.
        size: what is drawn; None takes the pipeline's own.
        guidance_2: what that scale is below the stretch of a teacher's first network; None is the same.
        owned: nobody else has the pipeline: its networks may be changed.
        exact: the state of its network before that was rounded, on the CPU; None where it was not, or lost nothing.

    Raises:
        UserError: for a pipeline that is offloaded, for a size that it does not draw, for a shift or a second scale
            where there is none, or a scheduler of its own whose spacing is no shift.
    """

    def __init__(
        self,
        pipe: Any,
        device: torch.device | str = "cpu",
        family: Family | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        shift: float | None = None,
        guidance: float = 1.0,
        guidance_rescale: float = 0.0,
        size: Size | None = None,
        guidance_2: float | None = None,
        owned: bool = False,
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_unmoved(pipe)
        self.pipe: Any = with_merged_adapters(without_filters(pipe))
        self.guidance_interval, self.guidance_rescale = guidance_interval, guidance_rescale
        self.guidance, self.guidance_2 = guidance, guidance_2
        self.owned, self.exact = owned, exact
        self.pipe.set_progress_bar_config(disable=True)
        family = family or known_family(type(pipe).__name__)
        if family is None:
            check_class(type(self.pipe))
        else:
            self._take(family, size)
        self.pipe.to(device)
        vae = self.pipe.components.get("vae")
        if isinstance(vae, nn.Module) and vae.dtype != torch.float32:
            self.replace_parts(vae=copy.deepcopy(vae).float())  # in float16, SDXL's overflows
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.device = torch.device(device)
        path, output = path_of(self.pipe.scheduler)
        if family is None:
            if guiders := switched_off(self.pipe):
                self.replace_parts(**guiders)
            self._take(record(self.pipe, path, output, size, guidance), size)
        net, shape = network_of(self.family, self.pipe), self.codec.shape
        if isinstance(path, FlowPath):
            tokens = self.family.drawn_tokens(self.pipe, self.size)
            path = FlowPath(
                shift or self.family.shift(self.pipe, tokens), self.family.clock_shift(self.pipe, tokens)
            )
        elif shift is not None:
            raise UserError(
                f"options.shift is {shift:g}, but the times of a {type(self.pipe.scheduler).__name__} have no shift, "
                "which only flow models have: leave it out"
            )
        if guidance_2 is not None and not isinstance(net, SwitchedNetworks):
            raise UserError(
                f"options.guidance_2 is {guidance_2:g}, but this teacher has one network for all noise: leave it out"
            )
        if guidance_2 is not None and guidance in (0.0, 1.0) and guidance_2 != guidance:
            raise UserError(
                f"options.guidance is {guidance:g} and options.guidance_2 {guidance_2:g}, but guidance that is on in "
                f"the second network's stretch alone is said by its times: set options.guidance={guidance_2:g} and "
                "options.guidance_interval=[0, B], B the pipeline's boundary_ratio, and leave guidance_2 out"
            )
        self.denoiser: Denoiser = Denoiser(net, path, output, self.family, shape)
        if self.family.changes.takes_guidance(net):
            if guidance_rescale:
                raise UserError(
                    f"options.guidance_rescale is {guidance_rescale:g}, but this teacher takes guidance as an input "
                    "and has no other output to rescale to: set 0"
                )
            self.denoiser.guidance = guidance
        self.start = self.denoiser
        self.null = self.codec.null()

    def _take(self, family: Family, size: Size | None) -> None:
        """Makes a family that of the teacher."""
        self.family = family
        self.size = size or family.default_size(self.pipe)
        family.check_size(self.pipe, self.size)
        family.adopt(self.pipe)

    @property
    def codec(self) -> Codec:
        """The pipeline's encoders and decoders."""
        return Codec(self.pipe, self.family, self.size, self.device)

    def replace_parts(self, **components: Any) -> None:
        """Sets components of the pipeline in a copy of it: the one that was handed in stays as it is."""
        self.pipe = copy.copy(self.pipe)
        self.pipe.register_modules(**components)

    def compute_in(self, dtype: torch.dtype, *, in_place: bool = False) -> None:
        """From here on the network computes in float32 or bfloat16, whatever autocast is on around it, and is held for
        that; trainable copies are to be made before. Encoders stay as they are, the VAE is float32.

        Args:
            dtype: one of the two.
            in_place: round the network itself to bfloat16, without a second one in memory.
        """
        net = self.denoiser.net
        if dtype == torch.bfloat16:
            net = in_bfloat16(net, in_place=in_place)
        elif any(value.dtype != dtype for value in net.parameters()):
            net = copy.deepcopy(net).to(dtype)
        if net is not self.denoiser.net:
            self.hold(net)
        self.denoiser.compute = dtype

    def hold(self, net: nn.Module) -> None:
        """Takes another network of the same kind for the teacher's, also in its pipeline."""
        self.replace_parts(**dict(zip(self.family.stretches(self.pipe), networks_in(net), strict=True)))
        self.denoiser.net = net

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @property
    def has_null(self) -> bool:
        return self.null is not None and self.denoiser.guidance is None

    @torch.no_grad()
    def predict(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        """What the teacher says about x_t [B, ...] at t [B]; guided prediction is one call of 2 B samples, or of B
        where the network takes the scale as an input.

        Args:
            x_t, t, cond: of the B samples.
            guidance: the scale, one or [B]. That of the recipe is ``guidance_2`` in the second network's stretch; any
                other is itself in both: 0 is the unconditional mode, 1 is no guidance.

        Raises:
            UserError: when guidance is asked of a model that has no unconditional mode.
        """
        return self.predict_with_input_gradient(x_t, t, cond, guidance=guidance)

    def predict_with_input_gradient(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        """The same prediction with a graph to x_t; the teacher's own weights are frozen and get no gradient.

        Raises:
            UserError: when guidance is asked of a model that has no unconditional mode.
        """
        if self.denoiser.guidance is not None:
            scale = in_interval(guidance, t, *self.guidance_interval)
            return self.denoiser.predict(x_t, t, cond.with_tensor(GUIDANCE, scale))
        if not isinstance(guidance, Tensor) and guidance == 1.0:
            return self.denoiser.predict(x_t, t, cond)
        if self.null is None:
            raise UserError(
                f"guidance {guidance} needs an unconditional mode, which {self.family.name} has not: set 1"
            )
        null = self.family.unguided(self.null, cond)
        weak, strong = self.denoiser.raw_pair(x_t, t, null, cond)
        if self.guidance_2 is not None:
            guidance = self._by_stretch(guidance, t)
        if self.guidance_interval != (0.0, 1.0):
            guidance = in_interval(guidance, t, *self.guidance_interval)
        out = self._guided(weak, strong, guidance)
        return self.path.read(out, self.denoiser.output, x_t, t)

    def _guided(self, weak: Tensor, strong: Tensor, guidance: float | Tensor) -> Tensor:
        """The network's outputs [B, ...], guided as the pipeline does; ``weak`` itself where the scale is 0."""
        out, family = extrapolate(weak, strong, guidance), self.family
        if family.keeps_length:
            kept = with_length_of(family.pack(out), family.pack(strong))
            out = family.unpack(kept, tuple(strong.shape[1:]))
        if self.guidance_rescale:
            out = rescaled(out, strong, self.guidance_rescale)
        if isinstance(guidance, Tensor):
            return torch.where(per_sample(guidance == 0, out), weak, out)
        return out if guidance else weak

    def _by_stretch(self, guidance: float | Tensor, t: Tensor) -> Tensor:
        """The scale [B] at t [B]: below the stretch of the first network ``guidance_2``, where it is the recipe's."""
        assert isinstance(self.denoiser.net, SwitchedNetworks) and self.guidance_2 is not None
        first = self.family.time(self.path, t) > self.denoiser.net.bounds[0]
        scale = guidance if isinstance(guidance, Tensor) else torch.full_like(t, guidance)
        return torch.where(first | (scale != self.guidance), scale, self.guidance_2)

    def fingerprint(self) -> str:
        """SHA-256 of the weights and configs of the pipeline: what the teacher's samples depend on."""
        return weights_hash(self.pipe)

    def encoder_fingerprint(self) -> str:
        """The same of what prompts are encoded with: of all but its denoiser, its scheduler and, where no picture is
        encoded with them, its VAE."""
        others = ("scheduler",) if self.family.from_picture else ("vae", "scheduler")
        return weights_hash(self.pipe, lambda name: name in others or name.startswith(self.family.network))

    def vae_fingerprint(self) -> str:
        """The same of what images are encoded with: of all but its denoiser, its text encoders and its scheduler."""
        others = ("text_encoder", "scheduler", self.family.network)
        return weights_hash(self.pipe, lambda name: name.startswith(others))


class Teacher(Protocol):
    """A frozen model on a path. PipelineTeacher implements it, and so do the closed-form teachers of the tests."""

    @property
    def path(self) -> Path: ...

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def has_null(self) -> bool:
        """Whether it has an unconditional mode, which guidance 0 asks for."""
        ...

    @property
    def start(self) -> Denoiser:
        """What a student and a network that follows it start as: the same network, or it turned into another output."""
        ...

    def predict(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        """What the teacher says about x_t [B, ...] at t [B], under classifier-free guidance; never holds a graph."""
        ...

    def predict_with_input_gradient(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        """The same prediction with a graph to x_t, and none to the teacher's weights."""
        ...
