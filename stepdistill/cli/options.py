"""What several verbs take, and the command as it was given."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

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


def command_line() -> str:
    """The command as the user gave it, for the report."""
    return shlex.join(["stepdistill", *sys.argv[1:]])
