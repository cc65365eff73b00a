"""Whether a teacher is itself a student: guided in its weights, and not to be guided again, or of few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.networks.find import local_folder
from stepdistill.networks.own_call import OwnCall, own_call
from stepdistill.networks.teacher import PipelineTeacher

OF_FEW_STEPS = frozenset(
    {"LCMScheduler", "TCDScheduler", "FlowConsistencyScheduler", "FlowMapEulerDiscreteScheduler"}
)
"""Schedulers with which students of few steps are published."""
FEW = 8
"""Fewer steps than so many are few."""


def _published_in_few_steps(teacher: PipelineTeacher) -> str:
    """What of its scheduler says that it is a student of few steps; empty where nothing does."""
    scheduler = teacher.pipe.scheduler
    name, config = type(scheduler).__name__, scheduler.config
    if name in OF_FEW_STEPS:
        return f"its scheduler is {name}, of students of few steps"
    if name == "EulerAncestralDiscreteScheduler" and config.timestep_spacing == "trailing":
        return "its scheduler is that of SDXL-Turbo and SD-Turbo"
    return ""


def _call_of(source: Any) -> OwnCall | None:
    """The own call of a student in a folder; None of anything else."""
    folder = local_folder(source) if isinstance(source, (str, Path)) else None
    return None if folder is None else own_call(folder)


def why_of_few_steps(teacher: PipelineTeacher, source: Any) -> str:
    """What says that the teacher draws in few steps, and so denoises at those alone; empty where nothing does.

    Args:
        teacher, source: see :func:`why_guided_already`.
    """
    own = _call_of(source)
    if own is not None and own.steps < FEW:
        return f"its folder says that it draws in {own.steps}"
    return _published_in_few_steps(teacher)


def why_guided_already(teacher: PipelineTeacher, source: Any) -> str:
    """What says that the teacher was distilled from a guided one; empty where nothing does, or where its guidance is an
    input, or none can be asked for.

    Args:
        teacher: the teacher.
        source: a folder or a Hub name; anything else is a pipeline.
    """
    if teacher.null is None or teacher.denoiser.guidance is not None:
        return ""
    own = _call_of(source)
    if own is not None and own.input_guidance is None:
        return "it is a student whose folder says so"
    return _published_in_few_steps(teacher)


def guidance_warning(teacher: PipelineTeacher, source: Any, guidance: float) -> str | None:
    """A line where guidance is asked of such a teacher.

    Args:
        teacher, source: see :func:`why_guided_already`.
        guidance: the scale; 1 is none.
    """
    if guidance == 1.0 or not (why := why_guided_already(teacher, source)):
        return None
    return (
        f"warning: options.guidance is {guidance:g}, but this teacher has guidance in its weights ({why}), and guiding "
        "it again spoils its pictures: set options.guidance=1"
    )
