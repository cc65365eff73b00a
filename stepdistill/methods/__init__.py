"""The methods, one file each, and how they are found by name or by path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from stepdistill.errors import UserError, did_you_mean
from stepdistill.types import Method


def method_names() -> list[str]:
    """Names of the methods that come with the package: the files of this folder."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))


def find_method(name: str) -> type[Method]:
    """The method called ``name``, or the one in the Python file that ``name`` is the path of.

    Raises:
        UserError: for an unknown name, a missing file, or a file without exactly one Method.
    """
    if name.endswith(".py"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"method {name}: there is no such file")
        spec = importlib.util.spec_from_file_location(f"stepdistill_method_{file.stem}", file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    elif name in method_names():
        module = importlib.import_module(f"stepdistill.methods.{name}")
    else:
        raise UserError(
            f"method {name} is unknown {did_you_mean(name, method_names())}; or give a path, ./my_method.py"
        )
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
