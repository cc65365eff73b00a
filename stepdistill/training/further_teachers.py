"""Further frozen teachers of a recipe, loaded, and checked to speak of the same states and prompts as its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stepdistill.attention.kernels import fit_attention
from stepdistill.data.prompts import open_prompts
from stepdistill.errors import UserError
from stepdistill.families import family_in
from stepdistill.losses.contract import Method, MethodOptions
from stepdistill.networks.find import find_lora
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.roles import TEACHER
from stepdistill.networks.route import Route
from stepdistill.networks.teacher import PipelineTeacher, Teacher
from stepdistill.recipes.recipe import WEAK, Recipe
from stepdistill.training.roles import teacher_type


def check_several(recipe: Recipe, kind: type[Method]) -> None:
    """The method learns from further teachers, or has a guide, where the recipe has such.

    Raises:
        UserError: it does not, or networks are sharded.
    """
    if not recipe.teachers:
        return
    if WEAK in recipe.teachers and not kind.weak_teacher:
        raise UserError(
            f"teachers.{WEAK} is to guide the teacher, but in {recipe.method} nothing does: leave it out, or take a "
            "method with such a guide, such as ayf"
        )
    if not kind.several_teachers and (others := recipe.teachers.keys() - {WEAK}):
        raise UserError(
            f"teachers names {', '.join(sorted(others))}, but {recipe.method} learns from one teacher: leave teachers "
            "and data.route out, or take a method that learns from several, such as opd"
        )
    if recipe.train.parallel == "sharded":
        raise UserError(
            "train.parallel is sharded, but each of several teachers is called for the samples of its own prompts "
            "alone, and sharded networks are called by all processes together: set train.parallel=replicated"
        )


def further_teachers(
    recipe: Recipe, options: MethodOptions, own: PipelineTeacher, prompts: Sequence[str]
) -> dict[str, PipelineTeacher]:
    """The recipe's further teachers by name; none is loaded before the files of their prompts are read.

    Args:
        recipe: what names them.
        options: of the method.
        own: the recipe's teacher.
        prompts: those to train on.

    Raises:
        UserError: one has other states, other conditions or another noise schedule than the recipe's own.
    """
    routed(recipe, prompts)
    found: dict[str, PipelineTeacher] = {}
    for name, place in recipe.teachers.items():
        pipe = _loaded(recipe, name, place)
        if type(pipe) is not type(own.pipe):
            raise _another(recipe, name, "pipeline class")
        made = PipelineTeacher(
            pipe,
            own.device,
            own.family,
            guidance_interval=options.guidance_interval,
            shift=options.shift,
            guidance=options.guidance,
            guidance_rescale=options.guidance_rescale,
            size=own.size,
            guidance_2=options.guidance_2,
            owned=True,
        )
        if (other := _apart(made, own)) is not None:
            raise _another(recipe, name, other)
        fit_attention(recipe.train.attention, made.denoiser.net, own.device)
        made.compute_in(teacher_type(recipe.train))
        found[name] = made
    return found


def _another(recipe: Recipe, name: str, what: str) -> UserError:
    return UserError(
        f"teachers.{name}: {recipe.teachers[name]} has another {what} than {recipe.teacher}, so that it cannot teach "
        "the same student: give a fine-tuned copy of that teacher, or a LoRA on it"
    )


def _loaded(recipe: Recipe, name: str, place: str) -> Any:
    """The pipeline of a further teacher."""
    lora = find_lora(place)
    family = family_in(recipe.family) if recipe.family else None
    pipe = load_teacher(recipe.teacher if lora else place, family=family)
    if lora is None:
        return pipe
    try:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    except (AttributeError, ValueError, KeyError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"teachers.{name}: {place} is no LoRA for {recipe.teacher}: {why}") from None
    return pipe


def _apart(other: PipelineTeacher, own: PipelineTeacher) -> str | None:
    """In what two teachers cannot teach one student."""
    if other.denoiser.output != own.denoiser.output:
        return "output"
    if not other.path.same_schedule(own.path):
        return "noise schedule"
    if other.encoder_fingerprint() != own.encoder_fingerprint():
        return "text encoder"
    return "VAE" if other.vae_fingerprint() != own.vae_fingerprint() else None


def routed(recipe: Recipe, prompts: Sequence[str]) -> Tensor:
    """Which teacher each prompt belongs to, [P]: 0 for the recipe's own, and from 1 the further ones in their order.

    Raises:
        UserError: a prompt has two teachers, or a teacher none of the prompts.
    """
    owner: dict[str, int] = {}
    names = [name for name in recipe.teachers if name != WEAK]
    for number, name in enumerate(names, 1):
        for prompt in open_prompts(Path(recipe.data.route[name]), f"data.route.{name}"):
            if owner.setdefault(prompt, number) != number:
                raise UserError(
                    f"data.route gives {prompt!r} to both {names[owner[prompt] - 1]} and {name}: take it out of "
                    "one of the two files"
                )
    found = torch.tensor([owner.get(prompt, 0) for prompt in prompts])
    if idle := [name for number, name in enumerate(names, 1) if not bool((found == number).any())]:
        raise UserError(
            f"data.route.{idle[0]}: none of the prompts in {recipe.data.route[idle[0]]} is one to train on: give some "
            "as data.prompts has them, to the letter"
        )
    return found


def route_of(
    recipe: Recipe, own: Teacher, others: dict[str, PipelineTeacher], prompts: Sequence[str]
) -> Route:
    """All teachers with the prompts that are theirs, and the guide; the calls of each are counted as the teacher's."""
    for each in others.values():
        each.denoiser.counter, each.denoiser.who = own.denoiser.counter, TEACHER
    named = {name: each for name, each in others.items() if name != WEAK}
    return Route({TEACHER: own, **named}, routed(recipe, prompts) if named else None, others.get(WEAK))


def identity_of(route: Route) -> dict[str, str]:
    """SHA-256 of the further teachers, and of which prompt is whose: a run goes on with the very same alone."""
    others = {name: each for name, each in route.teachers.items() if name != TEACHER}
    if route.weak is not None:
        others[WEAK] = route.weak
    hashes = {f"teachers.{name}": cast(PipelineTeacher, each).fingerprint() for name, each in others.items()}
    if route.of_prompt is None:
        return hashes
    return hashes | {"data.route": hashlib.sha256(route.of_prompt.numpy().tobytes()).hexdigest()}
