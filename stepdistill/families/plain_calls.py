"""What calls of pipelines are told so that they draw what was asked for, and recordings see one plain call a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

AS_ASKED: dict[str, Any] = {
    "use_resolution_binning": False,  # or other sizes are snapped to those of a list, and stretched
    "enable_prompt_rewrite": False,  # or a language model writes every prompt anew
    "use_pe": False,
    "_auto_resize": False,  # or a picture to draw from is
}
"""In every call that takes it, whoever draws: students, teachers, recordings."""


def of_count(steps: int) -> dict[str, Any]:
    """What a call that takes ``intermediate_timesteps``, SANA-Sprint's, is told of so many steps: its default is the
    second of two, and an error for any other number."""
    return {} if steps == 2 else {"intermediate_timesteps": None}


def drawing_call(takes: Collection[str], steps: int, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a call that draws in so many steps, whoever draws; prompts and guidance come beside them.

    Args:
        takes: names of the arguments that the call takes.
        steps: network calls per picture.
        own: further arguments of a student's own call.
    """
    asked = {name: value for name, value in AS_ASKED.items() if name in takes}
    counted = of_count(steps) if "intermediate_timesteps" in takes else {}
    return {**asked, **(own or {}), "num_inference_steps": steps, **counted}


FRAMES = frozenset({"num_frames", "frames", "video_length"})
"""What calls of pipelines of videos name the number of frames."""

PLAIN: dict[str, Any] = {
    **AS_ASKED,
    "pag_scale": 0.0,  # guidance by another call of the network, with attention to nothing but itself
    "sag_scale": 0.0,  # the same, of a blurred picture
    "guidance_schedule": None,  # a scale for every step, in place of one
    "use_kv_cache": False,  # or the first step alone reads the prompt
}
"""In every call that takes it while it is recorded, and in its students'."""
