"""Distil diffusion and flow pipelines into students that draw in one to eight steps.

>>> import stepdistill
>>> run = stepdistill.distill(teacher="emoji", method="dmd", output="runs/dmd")
>>> run.student, run.report
>>> stepdistill.evaluate(run.student, suite="emoji", steps=(1,))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepdistill.evaluation.evaluate import evaluate
    from stepdistill.recipes.recipe import load_recipe
    from stepdistill.training.distil import distill

__version__ = "0.1.0"

__all__ = ["__version__", "distill", "evaluate", "load_recipe"]

# torch and diffusers take ten seconds to import, so a public name is imported when it is first used (PEP 562).
_HOMES = {"distill": "training.distil", "evaluate": "evaluation.evaluate", "load_recipe": "recipes.recipe"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
