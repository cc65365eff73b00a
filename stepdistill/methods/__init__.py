"""The methods, one file each, found by being here, or by the path of a file of one's own.

A method is its paper; what several share stands in ``losses/``. Training comes in here, and no method knows another.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from pydantic import ValidationError

from stepdistill.errors import UserError, did_you_mean
from stepdistill.losses.contract import NEEDS, Method
from stepdistill.recipes.messages import explain
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.python_files import module_of
from stepdistill.system.shipped import method_names

if TYPE_CHECKING:
    from stepdistill.losses.contract import MethodOptions


def find_method(name: str) -> type[Method]:
    """The method called ``name``, or the one in the Python file that ``name`` is the path of.

    Raises:
        UserError: for an unknown name, a missing file, or a file without exactly one Method.
    """
    if name.endswith(".py"):
        module = module_of(name, "method")
    elif name in method_names():
        module = importlib.import_module(f"stepdistill.methods.{name}")
    else:
        near = did_you_mean(name, method_names(), "stepdistill ls methods")
        raise UserError(f"method {name} is unknown {near}; or give a path, ./my_method.py")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(
            f"method {name}: the file defines {len(found)} subclasses of Method, it must define one"
        )
    return found[0]


def needs(name: str) -> str:
    """What a method asks of the data with its default options, and in brackets what single options can add."""
    kind = find_method(name)
    plain = kind.Options()
    own = plain.needs
    more: set[str] = set()
    for field, info in kind.Options.model_fields.items():
        default = info.default
        values = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        for value in values or ([type(default)(1)] if type(default) in (int, float, bool) else []):
            more |= plain.model_copy(update={field: value}).needs - own
    text = ", ".join(need for need in NEEDS if need in own)
    extra = ", ".join(need for need in NEEDS if need in more)
    return f"{text} (+ {extra})" if extra else text


def method_options(recipe: Recipe) -> MethodOptions:
    """The recipe's options in the method's own Options class. Imports the method, and torch with it.

    Raises:
        UserError: an option the method does not have, or a value it cannot take.
    """
    schema = find_method(recipe.method).Options
    try:
        return schema.model_validate(recipe.options)
    except ValidationError as error:
        name = Path(recipe.method).stem
        raise UserError(explain(error, schema, "options", name, recipe._sources, recipe.method)) from None
