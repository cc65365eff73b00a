"""Whether a run may learn from images of several sizes, and from which."""

from __future__ import annotations

from dataclasses import replace

import torch

from stepdistill.data.buckets import bucket_sizes
from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.families.size import Size
from stepdistill.losses.contract import MethodOptions
from stepdistill.losses.gan import Discriminator
from stepdistill.losses.objective import Objective
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe


def buckets_for(
    recipe: Recipe, options: MethodOptions, teacher: PipelineTeacher, needs: frozenset[str]
) -> list[Size]:
    """The sizes of ``data.buckets``, the teacher's own first.

    Args:
        recipe: its data and how it is trained.
        options: of its method.
        teacher: what must draw all of the sizes, at the same times.
        needs: what the method asks of the data.

    Raises:
        UserError: it does not, or nothing would be of several sizes.
    """
    family, pipe, own = teacher.family, teacher.pipe, teacher.size
    if "images" not in needs or recipe.data.images is None:
        raise UserError(
            f"data.buckets is true, but {recipe.method} with these options learns from no images of data.images: set "
            "it to false"
        )
    if "pairs" in needs:
        raise UserError(
            f"data.buckets is true, but {recipe.method} with these options learns from pairs, which have one size: set "
            "it to false"
        )
    if recipe.train.compile != "none":
        raise UserError(
            f"data.buckets is true and train.compile is {recipe.train.compile}, which compiles a network for one size: "
            "set one of them to false and none"
        )
    name, found = type(pipe).__name__, bucket_sizes(family, pipe, own)
    for size in found[1:]:
        try:
            family.check_size(pipe, size)
        except UserError:
            raise UserError(
                f"data.buckets is true, but {name} draws no other size than {own}, and not {size}: set it to false"
            ) from None
    if isinstance(teacher.path, FlowPath) and options.shift is None:
        shifts = [_shift(teacher, size) for size in found]
        if len(set(shifts)) > 1:
            raise UserError(
                f"data.buckets is true, but the times of {name} shift with the size, by {min(shifts):.4g} to "
                f"{max(shifts):.4g}, and a student has one grid: set options.shift={shifts[0]:.4g}, or it to false"
            )
    return found


def check_calls(teacher: PipelineTeacher, sizes: list[Size], prompt: str) -> None:
    """The teacher's network takes states of all of the sizes, each is tried, and what it is told of them is known.

    Raises:
        UserError: it does not take one, or is told something else.
    """
    own = teacher.codec.encode([prompt]).tensors
    for size in sizes[1:]:
        codec = replace(teacher.codec, size=size)
        cond = codec.encode([prompt])
        told = {k for k, v in own.items() if v.shape != cond[k].shape or not torch.equal(v, cond[k])}
        if odd := sorted(told - teacher.family.size_conditions):
            raise UserError(
                f"data.buckets is true, but {', '.join(odd)} of {teacher.family.name} differ with the size, and are "
                "not among its size_conditions: set it to false"
            )
        x_t, t = torch.zeros(1, *codec.shape, device=teacher.device), torch.ones(1, device=teacher.device)
        try:
            with torch.no_grad():
                teacher.denoiser.raw(x_t, t, cond)
        except (RuntimeError, ValueError) as error:
            name, reason = type(teacher.denoiser.net).__name__, " ".join(str(error).split())[:200]
            raise UserError(
                f"data.buckets is true, but {name} takes no {size} ({reason}): set it to false"
            ) from None


def _shift(teacher: PipelineTeacher, size: Size) -> float:
    family, pipe = teacher.family, teacher.pipe
    return family.shift(pipe, family.drawn_tokens(pipe, size))


def check_heads(objective: Objective) -> None:
    """No discriminator is trained, whose head is made for the features of one size.

    Raises:
        UserError: one is.
    """
    if any(isinstance(module, Discriminator) for module in objective.modules()):
        raise UserError(
            "data.buckets is true, but a discriminator's head is made for one size: leave the GAN out "
            "(options.adversarial_weight=0 and terms.gan_weight=0), or set data.buckets to false"
        )
