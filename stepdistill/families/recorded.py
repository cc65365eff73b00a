"""A family that was recorded: what one pipeline does around its network, found by watching it draw (_recording.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.diffusion.path import Path, TablePath
from stepdistill.diffusion.shift import shifted
from stepdistill.errors import UserError, first_line
from stepdistill.families._arguments import Given, fill, state_rows, take
from stepdistill.families._lengths import length_by_length, padded
from stepdistill.families.base import Family
from stepdistill.families.condition import GUIDANCE, Condition, joined
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.plain_calls import FRAMES, PLAIN
from stepdistill.families.size import Size
from stepdistill.families.watching import frames_of, silent, watch


@dataclass(frozen=True)
class Reading:
    """Where in what a network returns its output is.

    Attributes:
        path: keys and numbers down to it.
        listed: it is a list of B tensors there.
        half: the axis along which the first half alone is used; None for all of it.
        sign: what the pipeline multiplies it with.
        last: the axis of a joint sequence whose last rows alone are used; None for all of them.
    """

    path: tuple[Any, ...]
    listed: bool
    half: int | None
    sign: float
    last: int | None = None

    def of(self, output: Any, shape: tuple[int, ...]) -> Tensor:
        """The output [B, ...] in this shape, without B."""
        for key in self.path:
            output = output[key]
        value: Tensor = torch.stack(list(output)) if self.listed else output
        value = value if self.half is None else value.chunk(2, self.half)[0]
        if self.last is not None:
            value = value.split(
                [value.shape[self.last] - shape[self.last - 1], shape[self.last - 1]], self.last
            )[1]
        value = value.reshape(-1, *shape)
        return value if self.sign == 1 else self.sign * value


@dataclass(frozen=True)
class Clock:
    """What the network is told: scale u + offset, where u is t of a flow path, or the index of a table.

    Attributes:
        scale, offset: of u.
        shift: of t on a flow path against u, see ``diffusion/shift.py``; 1 where they are the same.
    """

    scale: float
    offset: float
    shift: float = 1.0

    def __str__(self) -> str:
        if (self.scale, self.offset) == (1.0, 0.0):
            return "t"
        if not self.offset:
            return f"{self.scale:g} t"
        size = "" if abs(self.scale) == 1 else f"{abs(self.scale):g} "
        return f"{self.offset:g} {'-' if self.scale < 0 else '+'} {size}t"


@dataclass(frozen=True)
class Recording:
    """What was found, for one pipeline and one size.

    Attributes:
        template: the roles of the network's arguments, see ``_arguments.py``.
        reading: where its output is.
        state: shape of a state as its noise is drawn, without B.
        packed: shape of a state as the scheduler sees it.
        order: for every value of a packed state, where it stands in the state; None where it is the same.
        clock: the network's time.
        scheduler: the pipeline's own.
        silent: what the network returns for one state.
        call: arguments of an unguided call beside prompts and size.
        scale: of guidance, for a network that takes it.
        size: what is drawn.
        shift: of the times of its own schedule, on a flow path.
        takes: names of the call's arguments.
        lengths: conditions that are sequences of a length of each prompt's own, without a mask.
        null: what guidance starts from.
        plain_vae: whether its VAE alone decodes as the pipeline does.
        one_by_one: whether its VAE takes no two at once.
    """

    template: Any
    reading: Reading
    state: tuple[int, ...]
    packed: tuple[int, ...]
    order: Tensor | None
    clock: Clock
    scheduler: Any
    silent: Any
    call: Mapping[str, Any]
    scale: float
    size: Size
    shift: float | None
    takes: frozenset[str]
    lengths: tuple[str, ...] = ()
    null: Condition | None = None
    plain_vae: bool = False
    one_by_one: bool = False


class FixedGuidance(NetworkChanges):
    """A network that takes guidance goes on taking the scale that was recorded, as its pipeline hands it over."""

    def takes_guidance(self, net: Any) -> bool:
        return True

    def fold_guidance(self, net: nn.Module, guidance: float) -> nn.Module:
        return copy.deepcopy(net)


class Recorded(Family):
    """The base of families that are made for one pipeline; their facts are set on a subclass of each."""

    def __init__(self, found: Recording) -> None:
        self.found = found

    def default_size(self, pipe: Any) -> Size:
        return self.found.size

    def check_size(self, pipe: Any, size: Size) -> None:
        if size != self.found.size:
            raise UserError(
                f"data.size is {size}, but {type(pipe).__name__} was recorded at {self.found.size}"
            )

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        return self.found.state

    def shift(self, pipe: Any, tokens: int) -> float:
        return super().shift(pipe, tokens) if self.found.shift is None else self.found.shift

    def clock_shift(self, pipe: Any, tokens: int) -> float:
        return self.found.clock.shift

    def time(self, path: Path, t: Tensor) -> Tensor:
        clock = self.found.clock
        u = super().time(path, t) if isinstance(path, TablePath) else shifted(t.float(), 1 / clock.shift)
        told: Tensor = clock.scale * u + clock.offset
        return told

    def pack(self, x_t: Tensor) -> Tensor:
        flat, order = x_t.flatten(1), self.found.order
        return (flat if order is None else flat[:, order.to(flat.device)]).reshape(-1, *self.found.packed)

    def unpack(self, packed: Tensor, state: tuple[int, ...]) -> Tensor:
        flat, order = packed.flatten(1), self.found.order
        flat = flat if order is None else flat[:, order.argsort().to(flat.device)]
        return flat.reshape(-1, *state)

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        if not self.found.lengths:
            return self._call(net, x_t, time, cond)
        return length_by_length(
            net, self.found.lengths, lambda x, told, own: self._call(net, x, told, own), x_t, time, cond
        )

    def _call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        scale = cond.get(GUIDANCE)
        scale = torch.full_like(time, self.found.scale) if scale is None else scale
        given = fill(self.found.template, Given(self.pack(x_t), time, scale, cond))
        output = net(*given["args"], **given["kwargs"])
        return self.unpack(self.found.reading.of(output, self.found.packed), tuple(x_t.shape[1:]))

    def conditions(self, call: Any, rows: int) -> Condition:
        """The conditions [B, ...] of a call's arguments, with the lengths of sequences that have no mask."""
        found = dict[str, Tensor]()
        for name, values in take(self.found.template, call, rows).items():
            if name in self.found.lengths:
                found |= padded(name, values)
            else:
                found[name] = (
                    pad_sequence(values, batch_first=True) if values[0].ndim else torch.stack(values)
                )
        return Condition(found)

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        return joined([self._encoded(pipe, prompt) for prompt in prompts])

    def _encoded(self, pipe: Any, prompt: str) -> Condition:
        call = {**self._call_of([prompt]), "generator": [torch.Generator("cpu").manual_seed(0)]}
        seen = watch(pipe, call, scheduler=self.found.scheduler, end_at=self.network)
        return self.conditions({"args": seen.calls[-1].args, "kwargs": seen.calls[-1].kwargs}, 1)

    def _call_of(self, prompts: list[str]) -> dict[str, Any]:
        return self.call_arguments("", prompts, None, self.found.size) | {"num_inference_steps": 2}

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None if self.found.null is None else self.found.null.to(pipe.device)

    def examples_refused(self, pipe: Any) -> str | None:
        if self.found.plain_vae:
            return None
        return (
            f"{type(pipe).__name__} was recorded, and its VAE is not enough to say how it encodes images: leave out "
            "what learns from images (GAN weights, options.source), or write a family, see docs/extend/own_family.md"
        )

    def to_states(self, pipe: Any, frames: Tensor) -> Tensor:
        if (reason := self.examples_refused(pipe)) is not None:
            raise UserError(reason)
        try:
            states = self._one_by_one(super().to_states, pipe, frames)
        except RuntimeError as error:  # as of one that wants transparency beside the colours
            raise UserError(
                f"the VAE of this {type(pipe).__name__} does not take images of three colours ({first_line(error)}): "
                "leave out what learns from images"
            ) from error
        if tuple(states.shape[1:]) != self.found.state:
            raise UserError(
                f"images of {self.found.size} are states of {tuple(states.shape[1:])} to the VAE of this "
                f"{type(pipe).__name__}, which draws {self.found.state}: leave out what learns from images"
            )
        return states

    def by_frame(self, pipe: Any, states: Tensor, size: Size) -> Tensor | None:
        config = getattr(getattr(pipe, "vae", None), "config", {})
        channels = config.get("latent_channels") or config.get("z_dim")
        return super().by_frame(pipe, states, size) if self.found.state[0] == channels else None

    def to_frames(self, pipe: Any, x0: Tensor) -> Tensor:
        decode = super().to_frames if self.found.plain_vae else self.drawn_frames
        return self._one_by_one(decode, pipe, x0)

    def _one_by_one(self, of: Callable[[Any, Tensor], Tensor], pipe: Any, rows: Tensor) -> Tensor:
        """What its VAE makes of rows, which it may not take together."""
        return torch.cat([of(pipe, row[None]) for row in rows]) if self.found.one_by_one else of(pipe, rows)

    def drawn_frames(self, pipe: Any, x0: Tensor) -> Tensor:
        """The same by a draw whose network is silent and whose steps all end in x0; without a graph."""

        def quiet(*args: Any, **kwargs: Any) -> Any:
            rows = state_rows(self.found.template, {"args": args, "kwargs": kwargs}) or 0
            return silent(self.found.silent, rows)

        call = self._call_of([two_prompts(self.has_prompts)[0]] * len(x0)) | {
            "generator": [torch.Generator("cpu").manual_seed(0) for _ in x0],
            "output_type": "np",
        }
        state, network = self.pack(x0.detach()), {self.network: quiet}
        with torch.autocast(x0.device.type, enabled=False):
            drawn = watch(pipe, call, scheduler=self.found.scheduler, answer=state, instead=network).drawn
        return frames_of(drawn).to(x0)

    def features_of(self, net: nn.Module) -> nn.Module:
        raise UserError(
            f"{', '.join(self.pipelines)} was recorded, which does not say where a {type(net).__name__} has its "
            "features: set GAN weights to 0, or write a family, see docs/extend/own_family.md"
        )

    def feature_shape(self, net: nn.Module, state: tuple[int, ...]) -> tuple[int, int, int]:
        raise NotImplementedError("there are no features")

    def call_arguments(
        self, pipeline: str, prompts: list[str], guidance: float | None, size: Size | None
    ) -> dict[str, Any]:
        return {**prompt_arguments(self.found.takes, prompts, self.found.size), **self.found.call}


def two_prompts(has_prompts: bool) -> tuple[str, str]:
    """Of very different lengths, or the numbers of two classes."""
    return ("a photograph of a red fox that sleeps in deep snow", "cat") if has_prompts else ("0", "1")


def prompt_arguments(takes: frozenset[str], prompts: list[str], size: Size | None) -> dict[str, Any]:
    """The arguments of a pipeline's call that say what is drawn, of those that it takes."""
    call: dict[str, Any] = {}
    if "prompt" in takes:
        call["prompt"] = prompts
    else:
        call |= {"batch_size": len(prompts)} if "batch_size" in takes else {}
        call |= {"class_labels": [int(prompt) for prompt in prompts]} if "class_labels" in takes else {}
    if size is not None and {"height", "width"} <= takes:
        call |= {"height": size.height, "width": size.width}
    if size is not None:
        call |= dict.fromkeys(takes & FRAMES, size.frames)
        call |= dict.fromkeys(takes & {"max_area"}, size.height * size.width)  # or it scales to its own
    return call | {name: value for name, value in PLAIN.items() if name in takes}
