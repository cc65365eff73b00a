"""The model families that can teach; one file each."""

from __future__ import annotations

from typing import Any

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.dit import DiT
from stepdistill.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from stepdistill.families.stable_diffusion_3 import StableDiffusion3
from stepdistill.families.unet2d import UNet2D

FAMILIES: tuple[Family, ...] = (UNet2D(), DiT(), StableDiffusion(), StableDiffusionXL(), StableDiffusion3())

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]


def family_of(pipe: Any) -> Family:
    """The family that serves a pipeline object."""
    return family_named(type(pipe).__name__)


def family_named(found: str) -> Family:
    """The family that serves a pipeline class.

    Raises:
        UserError: for a pipeline of no known family, naming the families and how to write one.
    """
    for family in FAMILIES:
        if found in family.pipelines:
            return family
    known = "; ".join(f"{family.name} ({', '.join(family.pipelines)})" for family in FAMILIES)
    raise UserError(
        f"no family for {found}. There are: {known}. To add one, subclass stepdistill.families.base.Family "
        "(call, encode, null, features_of: 40 lines, see families/stable_diffusion_3.py) and pass it as "
        "PipelineTeacher(pipe, family=...)"
    )
