"""A student that starts as another network than the teacher's: of few steps already, smaller, or a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping

from stepdistill.errors import UserError
from stepdistill.families import family_in
from stepdistill.losses.contract import MethodOptions
from stepdistill.networks.fingerprint import networks_hash
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import say

KEY = "student.start"


def started_student(recipe: Recipe, options: MethodOptions, own: PipelineTeacher, *, told: bool) -> Student:
    """The student that ``student.start`` names, in float32, to be trained.

    Args:
        recipe: what names it.
        options: of the method.
        own: the teacher, whose encoders it is told by and whose states it draws.
        told: whether it is said where its text encoder is another.

    Raises:
        UserError: it has another network class, other states or another noise schedule than the teacher, or says what
            the recipe does not ask for.
    """
    place = str(recipe.student.start)
    family = family_in(recipe.family) if recipe.family else None
    try:
        pipe = load_teacher(place, family=family)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    if type(pipe) is not type(own.pipe):
        raise _another(recipe, f"pipeline class ({type(pipe).__name__}, {type(own.pipe).__name__})")
    of_its_own = PipelineTeacher(
        pipe,
        own.device,
        own.family,
        shift=options.shift,
        guidance=options.guidance,
        size=own.size,
        owned=True,
    )
    if (other := _apart(of_its_own, own)) is not None:
        raise _another(recipe, other)
    said, wanted = of_its_own.denoiser.output, recipe.student.output
    if wanted in ("v", "x0") and wanted != said:
        raise UserError(
            f"student.output is {wanted}, but {KEY}: {place} says {said}, and stays so: set student.output=teacher"
        )
    if told and of_its_own.encoder_fingerprint() != own.encoder_fingerprint():
        say(f"{KEY}: {place} has text encoders of its own, and is told what the teacher's say from here on")
    begun = Student.from_teacher(of_its_own)
    begun.start = place
    return begun


def _another(recipe: Recipe, what: str) -> UserError:
    return UserError(
        f"{KEY}: {recipe.student.start} has another {what} than {recipe.teacher}, so that it cannot become its "
        "student: give a student or a fine-tune of that teacher"
    )


def _apart(other: PipelineTeacher, own: PipelineTeacher) -> str | None:
    """In what a network cannot start another's student."""
    if type(other.denoiser.net) is not type(own.denoiser.net):
        return "network class"
    if other.codec.shape != own.codec.shape:
        return "size of states"
    return None if other.path.same_schedule(own.path) else "noise schedule"


def identity_of_start(recipe: Recipe, student: Student) -> Mapping[str, str]:
    """SHA-256 of the weights that a student was started with: a run goes on with the very same alone. Of a student
    that starts as the teacher nothing, which is told apart by the teacher's."""
    return {} if recipe.student.start is None else {KEY: networks_hash([student.net])}
