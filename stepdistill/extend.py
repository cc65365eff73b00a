"""The face for methods and families of one's own: all that they import, from one place.

What is named here stays where it is; the packages behind it may move. `docs/extend/own_method.md` has a worked example.
"""

from __future__ import annotations

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Path, Prediction, per_sample
from stepdistill.families.base import Family
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import LabelFamily, TransformerFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, MethodOptions, PairOptions, Trained, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Roles
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher, Teacher

__all__ = [
    "GUIDANCE",
    "Batch",
    "Condition",
    "Denoiser",
    "Draws",
    "Examples",
    "Family",
    "LabelFamily",
    "Loss",
    "Method",
    "MethodOptions",
    "NetworkChanges",
    "PairOptions",
    "Path",
    "PipelineTeacher",
    "Prediction",
    "Roles",
    "Sampler",
    "Size",
    "Student",
    "Teacher",
    "Trained",
    "TransformerFamily",
    "Turn",
    "per_sample",
]
