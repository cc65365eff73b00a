"""Packages that only some verbs need, asked for before anything slow."""

from __future__ import annotations

import importlib.util

from stepdistill.errors import UserError


def check_installed(extra: str, *packages: str) -> None:
    """The packages of an extra are installed.

    Raises:
        UserError: one is not, with the command that installs it.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f'{", ".join(missing)} is not installed: pip install "stepdistill[{extra}]"')
