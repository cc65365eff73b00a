"""Drawing the images of a suite with a diffusers pipeline's own call, each image from a seed of its own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stepdistill.diffusion.draws import generator_for
from stepdistill.errors import UserError
from stepdistill.evaluation.asked import asked_of, check_asked
from stepdistill.evaluation.suite import Suite
from stepdistill.evaluation.video_pipelines import sounds_of
from stepdistill.families import known_family
from stepdistill.families._guiders import guided_at, guiders_of
from stepdistill.families.base import call_default
from stepdistill.families.plain_calls import drawing_call
from stepdistill.pages.videos import Sound
from stepdistill.pictures.decoding import fit
from stepdistill.pictures.given import any_named, words_of

GUIDANCE_OFF = {"ZImagePipeline": 0.0, "Krea2Pipeline": 0.0}
"""The guidance_scale at which a pipeline does not guide, where it is not 1: these two guide above 0."""

OwnGuidance = Literal["own"]
"""Stands for the guidance that a pipeline has by default."""


class Drawing:
    """A suite's images, drawn by a pipeline's own call.

    Args:
        pipe: the pipeline.
        suite: how many images, their seeds, labels and sizes.
        prompts: one an image, None for a suite without.
        guidance: guidance_scale; None is no guidance, "own" what the pipeline's call does where it is told nothing.
        trailing: see :func:`stepdistill.evaluation.evaluate.evaluate`.
        eta: passed to the call where given.
        own: further arguments of a student's own call; the suite's size comes before theirs.
        videos: all frames of a video, at the pipeline's own size; else its middle frame stands for it.

    Attributes:
        guidance: the guidance_scale that is passed, the call's default, or that of the pipeline's guiders; None where
            there is none of these.
        seconds: wall time of the last drawing.
        passes: samples that went through the denoiser in the last drawing.
        sounds: of each video of the last batch, where they have some.

    Raises:
        UserError: the pipeline and the suite do not fit, or the call takes no eta.
    """

    def __init__(
        self,
        pipe: Any,
        suite: Suite,
        prompts: Sequence[str] | None,
        guidance: float | OwnGuidance | None,
        trailing: bool,
        eta: float | None = None,
        own: Mapping[str, Any] | None = None,
        videos: bool = False,
    ) -> None:
        self._own, self._videos = dict(own or {}), videos
        if guidance != "own":
            pipe = guided_at(pipe, guidance)
        self._pipe, self._suite, self._prompts, self._trailing = pipe, suite, prompts, trailing
        self._takes = frozenset(inspect.signature(pipe.__call__).parameters)
        _check_fit(pipe, self._takes, suite, prompts)
        self._labels = _labels(classes_of(pipe), suite) if "class_labels" in self._takes else None
        if eta is not None and "eta" not in self._takes:
            raise UserError(f"eta is {eta:g}, but the call of {type(pipe).__name__} takes no eta")
        self._eta = eta
        self.guidance, self._told = self._guidance(guidance)
        self.seconds, self.passes = 0.0, 0
        self.sounds: list[Sound] = []

    def _guidance(self, wanted: float | OwnGuidance | None) -> tuple[float | None, dict[str, float]]:
        """The scale for the record, and what the call is told of it."""
        pipe, takes_scale = self._pipe, "guidance_scale" in self._takes
        if wanted == "own":
            default = call_default(pipe, "guidance_scale") if takes_scale else None
            scales = [getattr(guider, "guidance_scale", None) for guider in guiders_of(pipe).values()]
            return next(iter(scales), default), {}
        off = GUIDANCE_OFF.get(type(pipe).__name__, 1.0)
        scale = off if wanted is None else float(wanted)
        told = {"guidance_scale": scale} if takes_scale else {}
        if guiders_of(pipe):
            return (1.0 if wanted is None else scale), told
        return (scale if takes_scale else None), told

    def batches(self, steps: int, batch: int, rows: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The images ``rows`` of the suite in their order, None is all: uint8 [B, 3, H, W] on the CPU; if
        videos are asked for, [B, F, 3, H, W]."""
        rows = range(self._suite.n) if rows is None else rows
        self.seconds, self.passes = 0.0, 0
        family = known_family(type(self._pipe).__name__)
        alone = family is not None and (family.alone or any_named(self._prompts or ()))
        batch = 1 if alone else batch
        scheduler = self._pipe.scheduler
        given: Mapping[str, Any] = {}
        if self._trailing:
            self._pipe.scheduler, given = trailing(scheduler, steps, self._takes)
        networks = [
            _denoiser(self._pipe),
            self._pipe.components.get("transformer_2"),
        ]  # Wan 2.2's, for low noise
        hooks = [net.register_forward_pre_hook(self._count, with_kwargs=True) for net in networks if net]
        try:
            for start in range(0, len(rows), batch):
                yield self._draw(rows[start : start + batch], steps, given)
        finally:
            for hook in hooks:
                hook.remove()
            self._pipe.scheduler = scheduler

    def _draw(self, rows: Sequence[int], steps: int, given: Mapping[str, Any]) -> Tensor:
        takes = self._takes
        call: dict[str, Any] = {
            **drawing_call(takes, steps, self._own),
            "generator": [torch.Generator("cpu").manual_seed(self._suite.seed(i)) for i in rows],
            "output_type": "pt",
            **given,
        }
        if "prompt" in takes and self._prompts is not None:
            some = [self._prompts[i] for i in rows]
            call |= asked_of(self._pipe, some, {**call, **self._sides()})
        elif "batch_size" in takes:
            call["batch_size"] = len(rows)
        if self._labels is not None:
            call["class_labels"] = [self._labels[i] for i in rows]
        call |= self._told
        if self._eta is not None:
            call["eta"] = self._eta
        call |= self._sides()
        begin = self._now()
        try:
            with torch.no_grad():
                drawn, *beside = self._pipe(**call, return_dict=False)
        except ValueError as error:  # a scheduler that is pinned to a grid says so
            name = type(self._pipe).__name__
            raise UserError(
                f"{name} cannot draw with {steps} step{'s' * (steps > 1)}: {' '.join(str(error).split())}"
            ) from None
        self.seconds += self._now() - begin
        # [B, 3, H, W] in [0, 1] on the pipeline's device; some pipelines know no tensors and give arrays [B, H, W, 3].
        drawn = drawn if isinstance(drawn, Tensor) else torch.from_numpy(drawn).movedim(-1, -3)
        self.sounds = sounds_of(self._pipe, beside)
        if drawn.ndim == 5 and not self._videos:  # a video [B, F, 3, H, W] is compared by its middle frame
            drawn = drawn[:, drawn.shape[1] // 2]
        drawn = drawn[..., :3, :, :]  # without transparency
        broken = (~drawn.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            index = rows[broken[0]]
            what = f"prompt {call['prompt'][broken[0]]!r}" if "prompt" in call else f"image {index}"
            seed = self._suite.seed(index)
            raise UserError(f"the pipeline drew NaN or Inf for {what} (seed {seed}, {steps} steps)")
        drawn = (drawn.float() * 255).round().to(torch.uint8).cpu()  # a quarter of the bytes to copy
        return drawn if self._videos else self._sized(drawn)

    def _sides(self) -> dict[str, int]:
        """The size that the call is told by the suite."""
        size = self._suite.draw_resolution or self._suite.resolution
        told = size and size != "own" and {"height", "width"} <= self._takes
        return {"height": size, "width": size} if told and isinstance(size, int) else {}

    def _now(self) -> float:
        """Seconds, when all that the pipeline's device was given is done."""
        if self._pipe.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _sized(self, drawn: Tensor) -> Tensor:
        """Drawn uint8 [B, 3, H, W] at the size at which they are compared."""
        size, (height, width) = self._suite.resolution, drawn.shape[2:]
        if not size or height == width == size:
            return drawn
        if self._suite.draw_resolution:
            fitted = [fit(image, size, ())[0] for image in drawn.permute(0, 2, 3, 1).numpy()]
            return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)
        label = self._suite.label
        raise UserError(f"the pipeline drew {width}x{height} pixels, suite {label} compares {size}x{size}")

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self.passes += 0 if first is None else len(first)


def cut_prompts(pipe: Any, prompts: Sequence[str]) -> list[str]:
    """One line for every tokenizer that reads only the beginning of some prompts, longer than it is made for."""
    lines = []
    for name, tokenizer in pipe.components.items():
        if not (prompts and isinstance(tokenizer, PreTrainedTokenizerBase)):
            continue
        most, cut = tokenizer.model_max_length, 0
        for first in range(0, len(prompts), 1024):  # of a million prompts the tokens are many
            ids = tokenizer(words_of(prompts[first : first + 1024]), verbose=False).input_ids
            cut += sum(len(each) > most for each in ids)
        if cut:
            lines.append(
                f"{cut} of {len(prompts)} prompts have more than the {most} tokens that the pipeline's {name} reads: "
                "the rest of them is cut off"
            )
    return lines


def _denoiser(pipe: Any) -> Any:
    """The network that is called at every step."""
    for name in ("transformer", "unet"):
        module = pipe.components.get(name)
        if isinstance(module, nn.Module):
            return module
    raise UserError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; it has {', '.join(pipe.components)}"
    )


def classes_of(pipe: Any) -> int:
    """How many classes a pipeline's network is conditioned on; 0 for none."""
    config = _denoiser(pipe).config  # DiT counts its classes in the one, UNet2DModel in the other
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0)


def _check_fit(pipe: Any, takes: frozenset[str], suite: Suite, prompts: Sequence[str] | None) -> None:
    """What would fail or mislead after minutes of drawing fails before."""
    name = type(pipe).__name__
    if "prompt" in takes:
        if prompts is None:
            raise UserError(
                f"{name} draws from prompts, suite {suite.label} has none: take one that has, or give --prompts FILE"
            )
        check_asked(pipe, prompts)
        return
    classes = classes_of(pipe)
    if prompts is not None:
        kind = f"draws from {classes} class labels" if classes else "draws without a condition"
        raise UserError(
            f"{name} takes no prompts (it {kind}), suite {suite.label} has them: take one without (prompts "
            "left out, clip_score false)"
        )
    if classes and "class_labels" not in takes:
        raise UserError(
            f"the network of this {name} has {classes} classes, which {name} does not pass on: make it a "
            "ConsistencyModelPipeline, which does"
        )


def _labels(classes: int, suite: Suite) -> list[int] | None:
    """The classes of a suite's images; None for a pipeline that could take them and whose network has none."""
    if not classes:
        return None
    if suite.labels == "balanced":
        return [i % classes for i in range(suite.n)]
    return torch.randint(classes, (suite.n,), generator=generator_for("suite", "labels")).tolist()


def trailing(scheduler: Any, steps: int, takes: frozenset[str]) -> tuple[Any, dict[str, Any]]:
    """The scheduler for n steps from the noisiest timestep, and what to add to the pipeline's call."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    if "timestep_spacing" in scheduler.config:
        kind: Any = type(scheduler)
        # One step of DPM-Solver is DDIM's, and PixArt's pipeline reads that one's x0.
        if isinstance(scheduler, PNDMScheduler) or (
            steps == 1 and isinstance(scheduler, DPMSolverMultistepScheduler)
        ):
            kind = DDIMScheduler
        clips = scheduler.config.get("clip_sample", False)
        return kind.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=clips), {}
    if "sigmas" in takes:
        return scheduler, {"sigmas": [1 - i / steps for i in range(steps)]}
    return scheduler, {}
