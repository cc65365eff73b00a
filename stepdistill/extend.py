"""The face for your own methods, families and metrics: all that they import, from one place.

What is named here stays where it is; the packages behind it may move. `docs/extend/own_method.md` and
`docs/extend/own_metric.md` have worked examples.
"""

from __future__ import annotations

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Path, Prediction, per_sample
from stepdistill.families._from_picture import PICTURE, FromPicture, TokensBehind, pictures_named
from stepdistill.families.base import Family
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.kinds import LabelFamily, TransformerFamily
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Method, MethodOptions, PairOptions, Trained, Turn
from stepdistill.metrics.own import DrawnImages, RealImages
from stepdistill.metrics.standard_errors import of_mean
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import Roles
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher, Teacher
from stepdistill.pictures.given import words_of

__all__ = [
    "GUIDANCE",
    "PICTURE",
    "Batch",
    "Condition",
    "Denoiser",
    "DrawnImages",
    "Draws",
    "Examples",
    "Family",
    "FromPicture",
    "LabelFamily",
    "Loss",
    "Method",
    "MethodOptions",
    "NetworkChanges",
    "PairOptions",
    "Path",
    "PipelineTeacher",
    "Prediction",
    "RealImages",
    "Roles",
    "Sampler",
    "Size",
    "Student",
    "Teacher",
    "TokensBehind",
    "Trained",
    "TransformerFamily",
    "Turn",
    "of_mean",
    "per_sample",
    "pictures_named",
    "words_of",
]
