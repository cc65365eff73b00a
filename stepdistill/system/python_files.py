"""Python files that a user names: your own method, family or metric."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from stepdistill.errors import UserError


def module_of(name: str, what: str) -> ModuleType:
    """The module in the file ``name``, run once as long as the file stays as it is, so that there is one class of it.

    Args:
        name: the file's path.
        what: what it is, to begin an error with.

    Raises:
        UserError: there is no such file, or it cannot be imported.
    """
    file = Path(name)
    if not file.is_file():
        raise UserError(f"{what} {name}: there is no such file")
    return _run(file.resolve(), file.stat().st_mtime_ns, what)


@cache
def _run(file: Path, changed_ns: int, what: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"stepdistill_{what}_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        del sys.modules[spec.name]
        raise UserError(f"{what} {file}: it cannot be imported: {type(error).__name__}: {error}") from error
    return module
