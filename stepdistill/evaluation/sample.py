"""Pictures or videos from any pipeline folder, one a prompt, as a user of the folder would draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError
from stepdistill.networks.find import find_pipeline
from stepdistill.networks.own_call import OwnCall, own_call, steps_of
from stepdistill.pictures.given import any_named
from stepdistill.system.log import say

if TYPE_CHECKING:
    from PIL.Image import Image

    from stepdistill.pages.videos import Sound


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        frames: of each prompt; a picture is one frame.
        rate: frames a second.
        sounds: of each prompt's video, where they have some.
    """

    frames: list[list[Image]]
    rate: float
    sounds: list[Sound] = field(default_factory=list)

    @property
    def pictures(self) -> list[Image]:
        """One of each prompt: of a video its middle frame."""
        return [frames[len(frames) // 2] for frames in self.frames]


def sample(
    pipeline: str,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Drawn:
    """A picture or a video per prompt.

    Args:
        pipeline: an embedded teacher, a diffusers folder, a student's, or a run folder (its student).
        prompts: the prompts; for a class-conditional pipeline, numbers of classes; for an unconditional one, any
            text, of which only the number counts.
        steps: network calls per image; None is a student's own count, and 25 of any other pipeline.
        guidance: classifier-free guidance scale; None is that of a student's own call, and the default of any other
            pipeline's.
        seed: image i is drawn from seed + i, whatever the other prompts are.
        device: None takes a GPU where there is one.

    Raises:
        UserError: no such pipeline, no prompts, a step count that the student was not trained for, or it takes neither
            prompts nor class numbers.
    """
    if not prompts:
        raise UserError(
            f'sample: there is no prompt; give one, such as: stepdistill sample {pipeline} "red apple"'
        )
    folder = find_pipeline(pipeline)
    own = own_call(folder)
    steps = steps_of(own, steps)
    if own is not None and (warning := own.warning(guidance)) is not None:
        say(warning)
    import torch

    from stepdistill.evaluation.video_pipelines import frame_rate, sounds_of
    from stepdistill.families._guiders import guided_at, guiders_of
    from stepdistill.networks.loading import load_pipeline

    pipe, _ = load_pipeline(folder, device, filters=True)
    if guidance is not None and guiders_of(pipe):
        pipe, guidance = guided_at(pipe, guidance), None
    at_once = 1 if draws_alone(pipe, own, prompts) else len(prompts)
    frames, sounds = list[list[Any]](), list[Any]()
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
        arguments = call_arguments(pipe, own, some, steps, guidance)
        try:
            drawn, *beside = pipe(**arguments, generator=generators, output_type="pil", return_dict=False)
        except ValueError as error:  # a scheduler that is pinned to a grid says so
            raise UserError(
                f"{type(pipe).__name__} cannot draw with {steps} step{'s' * (steps > 1)}: "
                f"{' '.join(str(error).split())}"
            ) from None
        frames += [item if isinstance(item, list) else [item] for item in drawn]
        sounds += sounds_of(pipe, beside)
    return Drawn(frames, frame_rate(pipe), sounds)


def draws_alone(pipe: Any, own: OwnCall | None, prompts: Sequence[str]) -> bool:
    """Whether a pipeline draws these prompts one at a time."""
    from stepdistill.families import known_family

    family = known_family(type(pipe).__name__)
    alone = (family is not None and family.alone) or (own is not None and own.alone)
    return alone or any_named(prompts)


def call_arguments(
    pipe: Any, own: OwnCall | None, prompts: Sequence[str], steps: int, guidance: float | None = None
) -> dict[str, Any]:
    """Arguments with which a pipeline draws prompts, a student as its own call has them.

    Args:
        pipe: the pipeline.
        own: the student's own call; None of any other pipeline.
        prompts, steps, guidance: see :func:`sample`.

    Raises:
        UserError: it takes neither prompts nor class numbers, or no guidance.
    """
    import inspect

    from stepdistill.evaluation.asked import asked_of
    from stepdistill.evaluation.drawing import classes_of
    from stepdistill.families.plain_calls import drawing_call

    takes = inspect.signature(pipe.__call__).parameters
    arguments = drawing_call(takes.keys(), steps, own.arguments if own else None)
    if "class_labels" in takes and classes_of(pipe):
        arguments["class_labels"] = _classes(prompts)
    elif "prompt" in takes:
        arguments |= asked_of(pipe, prompts, arguments)
    else:
        arguments["batch_size"] = len(prompts)
    if "guidance_scale" in takes:
        scale = guidance if guidance is not None or own is None else own.guidance
        arguments |= {} if scale is None else {"guidance_scale": scale}
    elif guidance is not None:
        raise UserError(f"--guidance {guidance:g}: {type(pipe).__name__} has no guidance; leave it out")
    return arguments


def _classes(prompts: Sequence[str]) -> list[int]:
    for prompt in prompts:
        if not prompt.strip().isdigit():
            raise UserError(f"{prompt}: this pipeline is class-conditional; give a class number")
    return [int(prompt) for prompt in prompts]
