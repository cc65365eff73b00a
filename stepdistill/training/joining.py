"""The students of the parts of one partition, found by the recipes of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from stepdistill.data.held_out import hold_out
from stepdistill.data.partition import parts_of, place_of
from stepdistill.data.prompts import open_prompts
from stepdistill.errors import UserError
from stepdistill.export.joined import Member
from stepdistill.export.verify import student_folder
from stepdistill.families import known_family
from stepdistill.families.kinds import LabelFamily
from stepdistill.networks.loading import load_pipeline
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.system.emoji import embedded_teachers, emoji_captions


def members_of(students: Sequence[Path]) -> tuple[list[Member], Sequence[str], Tensor]:
    """The students in the order of their parts, all prompts of their partition, and the part of each.

    Args:
        students: run folders, or the students in them.

    Raises:
        UserError: one lies in no run or learnt no part, two learnt the same, one is missing, or they are of several
            teachers, prompts or partitions.
    """
    found: dict[int, tuple[Member, Recipe]] = {}
    counts: set[int] = set()
    for student in students:
        folder = student_folder(student)
        file = folder.parent / "recipe.yaml"
        if not file.is_file():
            raise UserError(f"join: {student} lies in no run, so its part is not known: give run folders")
        recipe = load_recipe(file)
        if recipe.data.part is None:
            raise UserError(
                f"join: {student} learnt all prompts (it has no data.part): give students of parts"
            )
        place, count = place_of(recipe.data.part)
        counts.add(count)
        if place in found:
            raise UserError(f"join: {student} and {found[place][0].name} both learnt part {recipe.data.part}")
        member = Member(str(student), folder, recipe.teacher, float(recipe.options.get("guidance", 1.0)))
        found[place] = (member, recipe)
    (count,) = counts if len(counts) == 1 else (0,)
    if not count:
        raise UserError(
            f"join: these students are of {' and '.join(map(str, sorted(counts)))} parts: give one kind"
        )
    if missing := [f"{k + 1}/{count}" for k in range(count) if k not in found]:
        raise UserError(f"join: nobody has learnt part {', '.join(missing)}: train it, or give its run, too")
    ordered = [found[place] for place in range(count)]
    first = ordered[0][1]
    for member, recipe in ordered[1:]:
        for key, one, two in (
            ("teacher", first.teacher, recipe.teacher),
            ("data.prompts", first.data.prompts, recipe.data.prompts),
            ("data.partition", first.data.partition, recipe.data.partition),
        ):
            if one != two:
                raise UserError(
                    f"join: {member.name} has {key} {two}, and {ordered[0][0].name} {one}: they are no parts of one "
                    "whole"
                )
    prompts = _prompts(first, ordered[0][0].folder)
    return [member for member, _ in ordered], prompts, parts_of(prompts, first.data.partition, count)


def _prompts(recipe: Recipe, student: Path) -> Sequence[str]:
    """All prompts that the runs shared out."""
    embedded = recipe.teacher in embedded_teachers()
    if recipe.data.prompts is not None:
        prompts = open_prompts(Path(recipe.data.prompts))
        return prompts if embedded else hold_out(prompts)[1]
    if embedded:
        return emoji_captions()
    pipe = load_pipeline(student, "cpu")[0]
    family = known_family(type(pipe).__name__)
    if not isinstance(family, LabelFamily) or not family.classes(pipe):
        raise UserError(
            "join: the prompts of these students are not known: set data.prompts in their recipes"
        )
    return [str(label) for label in range(family.classes(pipe))]
