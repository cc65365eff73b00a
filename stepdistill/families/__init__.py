"""The families of pipelines that can teach, one file each, found by being here.

``base.py`` states what a family is; ``_recording.py`` makes one for a pipeline that no file here serves; ``kinds.py``
has what those around a UNet or a transformer share, ``_packing.py`` the tokens of those whose pipelines pack latents.
Nothing outside takes a state apart or knows how a network is called.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.system.python_files import module_of

__all__ = ["Family", "families", "family_in", "family_named", "family_of", "known_family"]


@cache
def families() -> tuple[Family, ...]:
    """One of each family that comes with the package: those of the files of this folder."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))
    return tuple(
        kind()
        for name in names
        for kind in _defined_in(importlib.import_module(f"stepdistill.families.{name}"))
    )


def _defined_in(module: ModuleType) -> list[type[Family]]:
    """The families that a module defines and that serve pipelines, in the order of the file."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Family)
        and value.__module__ == module.__name__
        and "pipelines" in vars(value)
    ]


def family_of(pipe: Any) -> Family:
    """The family that serves a pipeline object."""
    return family_named(type(pipe).__name__)


def known_family(found: str) -> Family | None:
    """The family that serves a pipeline class; None for one that no family knows, which may be recorded."""
    return next((family for family in families() if found in family.pipelines), None)


def family_named(found: str) -> Family:
    """The family that serves a pipeline class.

    Raises:
        UserError: for a pipeline of no known family, naming the families and how to write one.
    """
    if (family := known_family(found)) is not None:
        return family
    known = "; ".join(f"{family.name} ({', '.join(family.pipelines)})" for family in families())
    raise UserError(
        f"no family for {found}. There are: {known}. A family of your own is one file, see "
        "docs/extend/own_family.md: name it in the recipe's family"
    )


def family_in(file: str) -> Family:
    """The family that a Python file of one's own defines.

    Raises:
        UserError: there is no such file, it cannot be imported, or it defines no family or several.
    """
    found = _defined_in(module_of(file, "family"))
    if len(found) != 1:
        raise UserError(
            f"family {file}: the file defines {len(found)} subclasses of Family with pipelines, it must define one"
        )
    return found[0]()
