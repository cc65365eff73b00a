"""A run that does not depend on what becomes of the package's files while it is under way."""

from __future__ import annotations

import importlib
import pkgutil

import stepdistill

NEEDED = ("evaluation", "export", "features", "metrics", "pages", "training", "comparison", "cli")
"""What a run comes to need after its last update."""


def load_whole() -> None:
    """Imports all that a run needs until its end. A package that is upgraded in the meantime, or a source tree in which
    somebody works, would else be loaded in part later, and not fit what is loaded already."""
    for name in NEEDED:
        package = importlib.import_module(f"{stepdistill.__name__}.{name}")
        for found in pkgutil.iter_modules(package.__path__):
            if found.name != "__main__":
                importlib.import_module(f"{package.__name__}.{found.name}")
