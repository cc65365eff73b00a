"""Distil diffusion and flow pipelines into students that draw in one to eight steps.

>>> import stepdistill
>>> run = stepdistill.distill(teacher="emoji", method="dmd", output="runs/dmd")
>>> run.student, run.report
>>> stepdistill.evaluate(run.student, suite="emoji", steps=(1,))
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepdistill.distil import distill
    from stepdistill.evaluate import evaluate
    from stepdistill.recipe import load_recipe

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "evaluate", "load_recipe"]

# torch and diffusers take ten seconds to import, so a public name is imported when it is first used (PEP 562).
_HOMES = {"distill": "distil", "load_recipe": "recipe"}


class _Package(ModuleType):
    """This package, with ``stepdistill.evaluate`` the function even after the module of that name was imported."""

    @property
    def evaluate(self) -> object:
        value: object = import_module("stepdistill.evaluate").evaluate
        return value

    @evaluate.setter
    def evaluate(self, module: ModuleType) -> None:
        """The import system binds the module here once it is imported; the function stays."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
