"""The guidance that a recipe asks of its teacher, beside what the teacher has."""

from __future__ import annotations

from typing import Any

from stepdistill.errors import UserError
from stepdistill.losses.contract import MethodOptions
from stepdistill.networks.distilled import guidance_warning
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.log import say


def with_guidance_of(
    options: MethodOptions, name: str, teacher: PipelineTeacher, source: Any, *, told: bool
) -> MethodOptions:
    """The options, of a teacher that has no unconditional mode with guidance 1, as a method's own default is there.

    Args:
        options: of the method.
        name: the teacher's, in messages.
        teacher: the teacher.
        source: a folder or a Hub name; anything else is a pipeline.
        told: whether to warn where the teacher has guidance in its weights.

    Raises:
        UserError: another guidance is asked of a teacher that has no unconditional mode.
    """
    if teacher.null is None and teacher.denoiser.guidance is None:
        if options.guidance not in (1.0, type(options)().guidance):
            raise UserError(
                f"options.guidance is {options.guidance:g}, but {name} has no unconditional mode: set 1"
            )
        options = options.model_copy(update={"guidance": 1.0})
    if told and (warning := guidance_warning(teacher, source, options.guidance)) is not None:
        say(warning)
    return options
