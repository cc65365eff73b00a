"""Pictures from any text-to-image pipeline folder, on one grid."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepdistill.errors import UserError
from stepdistill.networks.find import find_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


def sample(
    pipeline: str,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Image]:
    """One image per prompt; of a video its middle frame.

    Args:
        pipeline: an embedded teacher, a diffusers folder or a run folder (its student).
        prompts: the prompts; for a class-conditional pipeline, numbers of classes; for an unconditional one, any
            text, of which only the number counts.
        steps: network evaluations per image.
        guidance: classifier-free guidance scale; None is 1, none: what a student wants.
        seed: image i is drawn from seed + i, whatever the other prompts are.
        device: None takes a GPU where there is one.

    Raises:
        UserError: no such pipeline, no prompts, or it takes neither prompts nor class numbers.
    """
    if not prompts:
        raise UserError("sample: there is no prompt; give --prompt TEXT")
    if steps < 1:
        raise UserError(f"--steps is {steps}, and must be 1 or more")
    folder = find_pipeline(pipeline)
    import torch
    from diffusers import DiTPipeline

    from stepdistill.networks.loading import load_pipeline

    pipe, _ = load_pipeline(folder, device, filters=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    arguments: dict[str, object] = {"num_inference_steps": steps, "generator": generators}
    if isinstance(pipe, DiTPipeline):
        arguments |= {"class_labels": _classes(prompts), "guidance_scale": guidance or 1.0}
    elif "text_encoder" in pipe.config:
        arguments |= {"prompt": list(prompts), "guidance_scale": guidance or 1.0}
    elif guidance is None:
        arguments |= {"batch_size": len(prompts)}
    else:
        raise UserError(f"--guidance {guidance}: {type(pipe).__name__} has no guidance; leave it out")
    if steps != 2 and "intermediate_timesteps" in inspect.signature(pipe.__call__).parameters:
        arguments["intermediate_timesteps"] = None  # SANA-Sprint's default is for two steps alone
    drawn = pipe(**arguments, output_type="pil", return_dict=False)[0]
    return [item[len(item) // 2] if isinstance(item, list) else item for item in drawn]


def _classes(prompts: Sequence[str]) -> list[int]:
    for prompt in prompts:
        if not prompt.strip().isdigit():
            raise UserError(f"--prompt {prompt}: this pipeline is class-conditional; give a class number")
    return [int(prompt) for prompt in prompts]
