"""What several verbs take, and the command as it was given."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Annotated

import typer

from stepdistill.errors import UserError

Pipeline = Annotated[
    str, typer.Argument(help="Embedded teacher, diffusers folder or run folder (its student).")
]
SCALE = "Classifier-free guidance scale; 1 is none."
Guidance = Annotated[
    float | None, typer.Option(help=f"{SCALE} [default: a student's own; a teacher's pipeline's]")
]
MeasuredGuidance = Annotated[
    float | None, typer.Option(help=f"{SCALE} [default: a student's own; none of a teacher]")
]
"""Of verbs whose pictures are measured: a score names its scale, and without one there is none."""


def sides_of(size: str) -> list[int]:
    """Height and width in pixels, and the frames of a video, of what ``--size`` is given.

    Raises:
        UserError: it is something else.
    """
    if not re.fullmatch(r"[1-9]\d*( *[x,] *[1-9]\d*){1,2}", size.strip()):
        raise UserError(
            f"--size is {size}: give HEIGHTxWIDTH in pixels, such as 1024x1024; of a video, xFRAMES too"
        )
    return [int(side) for side in re.split("[x,]", size)]


def command_line() -> str:
    """The command as the user gave it, for the report."""
    return shlex.join(["stepdistill", *sys.argv[1:]])
