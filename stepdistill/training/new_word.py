"""The word that a run's text encoders learn, where its method trains one."""

from __future__ import annotations

from pathlib import Path

from stepdistill.data.training_images import find_images
from stepdistill.errors import UserError
from stepdistill.networks.concept import KEYS, NewWord
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe


def check_word(recipe: Recipe, needed: bool) -> None:
    """A recipe names the word, and as what it starts, where its method trains one, and there alone.

    Raises:
        UserError: it does not.
    """
    data = recipe.data
    given = dict(zip(KEYS, (data.placeholder_token, data.initializer_token), strict=True))
    if needed and (lacking := [key for key, value in given.items() if value is None]):
        raise UserError(
            f"{recipe.method} learns a word, and {' and '.join(lacking)} say nothing: name a new word, such as "
            "data.placeholder_token='<concept>', that captions of data.images have, and one that it starts as, such as "
            "data.initializer_token=dog"
        )
    if needed and data.images is None:
        raise UserError(
            f"{recipe.method} learns a word from a few images: give a folder of them in data.images, with "
            "captions that have the word"
        )
    if needed and recipe.export.what == "adapter":
        raise UserError(
            f"export.what is adapter, but {recipe.method} also teaches the text encoders a word, which an "
            "adapter alone has not: set both or merged"
        )
    if not needed and (set_ := [key for key, value in given.items() if value is not None]):
        raise UserError(
            f"{set_[0]} is {given[set_[0]]}, but {recipe.method} learns no word: leave it out, or take echo"
        )


def new_word(recipe: Recipe, teacher: PipelineTeacher) -> NewWord:
    """The word, known to the teacher's pipeline from here on.

    Raises:
        UserError: the pipeline cannot learn it.
    """
    data = recipe.data
    assert data.images and data.placeholder_token and data.initializer_token
    captions = find_images(Path(data.images)).captions
    return NewWord(teacher, data.placeholder_token, data.initializer_token, captions)
