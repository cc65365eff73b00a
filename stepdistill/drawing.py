"""Drawing the images of a suite with a diffusers pipeline's own call, each image from a seed of its own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.checks import find_pipeline
from stepdistill.errors import UserError
from stepdistill.experts import is_own_code, travelling_code
from stepdistill.log import quiet_loading
from stepdistill.suite import Suite
from stepdistill.teacher import absent_components

GUIDANCE_OFF = {"ZImagePipeline": 0.0, "Krea2Pipeline": 0.0}
"""The guidance_scale at which a pipeline does not guide, where it is not 1: these two guide above 0."""


def load_pipeline(pipeline: Any, device: torch.device | str | None = None) -> tuple[Any, str]:
    """A pipeline object and what to call it, from an object or from what ``checks.find_pipeline`` takes.

    Raises:
        UserError: the path is not a folder with a model_index.json, or diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipeline, (str, Path)):
        pipe, label = pipeline, type(pipeline).__name__
    else:
        folder, label = find_pipeline(pipeline), str(pipeline)
        code = travelling_code(folder)
        quiet_loading()
        try:
            pipe = DiffusionPipeline.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                # A student of several experts carries a class of ours; other code is not run.
                trust_remote_code=bool(code) and all(is_own_code(file) for file in code),
                **absent_components(folder),
            )
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: diffusers cannot load it: {' '.join(str(error).split())}") from None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, label


class Drawing:
    """A suite's images, drawn by a pipeline's own call.

    Attributes:
        guidance: the guidance_scale that is passed, None where the call takes none.
        seconds: wall time of the last drawing.
        passes: samples that went through the denoiser in the last drawing.
    """

    def __init__(
        self,
        pipe: Any,
        suite: Suite,
        prompts: Sequence[str] | None,
        guidance: float | None,
        trailing: bool,
        eta: float | None = None,
    ) -> None:
        self._pipe, self._suite, self._prompts, self._trailing = pipe, suite, prompts, trailing
        self._takes = frozenset(inspect.signature(pipe.__call__).parameters)
        if "prompt" in self._takes and prompts is None:
            raise UserError(f"{type(pipe).__name__} draws from prompts, suite {suite.label} has none")
        if "prompt" not in self._takes and suite.clip_score:
            raise UserError(f"{type(pipe).__name__} takes no prompts: use a suite with clip_score false")
        if eta is not None and "eta" not in self._takes:
            raise UserError(f"eta is {eta:g}, but the call of {type(pipe).__name__} takes no eta")
        self._eta = eta
        self.guidance = None
        if "guidance_scale" in self._takes:
            off = GUIDANCE_OFF.get(type(pipe).__name__, 1.0)
            self.guidance = off if guidance is None else float(guidance)
        self.seconds, self.passes = 0.0, 0

    def batches(self, steps: int, batch: int) -> Iterator[Tensor]:
        """All images in order, uint8 [B, 3, H, W] on the CPU."""
        self.seconds, self.passes = 0.0, 0
        scheduler = self._pipe.scheduler
        given: Mapping[str, Any] = {}
        if self._trailing:
            self._pipe.scheduler, given = _trailing(scheduler, steps, self._takes)
        hook = _denoiser(self._pipe).register_forward_pre_hook(self._count, with_kwargs=True)
        try:
            for start in range(0, self._suite.n, batch):
                yield self._draw(range(start, min(start + batch, self._suite.n)), steps, given)
        finally:
            hook.remove()
            self._pipe.scheduler = scheduler

    def _draw(self, rows: range, steps: int, given: Mapping[str, Any]) -> Tensor:
        size, takes = self._suite.resolution, self._takes
        call: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": [torch.Generator("cpu").manual_seed(self._suite.seed(i)) for i in rows],
            "output_type": "np",
            **given,
        }
        if "prompt" in takes and self._prompts is not None:
            call["prompt"] = [self._prompts[i] for i in rows]
        elif "class_labels" in takes:
            classes = int(_denoiser(self._pipe).config.num_embeds_ada_norm)
            call["class_labels"] = [i % classes for i in rows]
        else:
            call["batch_size"] = len(rows)
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        if self._eta is not None:
            call["eta"] = self._eta
        if {"height", "width"} <= takes:
            call.update(height=size, width=size)
        if self._pipe.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                drawn = torch.from_numpy(self._pipe(**call).images)  # [B, H, W, 3] in [0, 1]
        except ValueError as error:  # a scheduler that is pinned to a grid says so
            name = type(self._pipe).__name__
            raise UserError(
                f"{name} cannot draw with {steps} steps: {' '.join(str(error).split())}"
            ) from None
        self.seconds += time.perf_counter() - begin
        broken = (~drawn.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            index = rows[broken[0]]
            what = f"prompt {call['prompt'][broken[0]]!r}" if "prompt" in call else f"image {index}"
            seed = self._suite.seed(index)
            raise UserError(f"the pipeline drew NaN or Inf for {what} (seed {seed}, {steps} steps)")
        if drawn.shape[1:3] != (size, size):
            height, width = drawn.shape[1:3]
            label = self._suite.label
            raise UserError(
                f"the pipeline drew {width}x{height} pixels, suite {label} compares {size}x{size}"
            )
        return (drawn * 255).round().to(torch.uint8).permute(0, 3, 1, 2)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self.passes += 0 if first is None else len(first)


def _denoiser(pipe: Any) -> Any:
    """The network that is called at every step."""
    for name in ("transformer", "unet"):
        module = pipe.components.get(name)
        if isinstance(module, nn.Module):
            return module
    raise UserError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; it has {', '.join(pipe.components)}"
    )


def _trailing(scheduler: Any, steps: int, takes: frozenset[str]) -> tuple[Any, dict[str, Any]]:
    """The scheduler for n steps from the noisiest timestep, and what to add to the pipeline's call."""
    from diffusers import DDIMScheduler, PNDMScheduler

    if "timestep_spacing" in scheduler.config:
        kind: Any = DDIMScheduler if isinstance(scheduler, PNDMScheduler) else type(scheduler)
        return kind.from_config(scheduler.config, timestep_spacing="trailing"), {}
    if "sigmas" in takes:
        return scheduler, {"sigmas": [1 - i / steps for i in range(steps)]}
    return scheduler, {}
