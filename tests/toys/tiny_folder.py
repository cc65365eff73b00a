"""A tiny teacher as a folder, for runs that are given a place and not a pipeline."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

SHARED = "STEPDISTILL_TESTS"
"""The environment variable that tells a process where the one that started it has such folders."""


def shared_folder() -> Path:
    """Where they lie: made by the first process that asks, and gone when that one ends."""
    if SHARED not in os.environ:
        os.environ[SHARED] = made = tempfile.mkdtemp(prefix="stepdistill-tests-")
        own = os.getpid()

        def remove() -> None:
            if os.getpid() == own:  # and not a fork of it
                shutil.rmtree(made, ignore_errors=True)

        atexit.register(remove)
    return Path(os.environ[SHARED])


@cache
def tiny_folder(name: str) -> str:
    """The folder of ``tiny_pipeline(name)``, saved by whichever process comes first."""
    from tiny import tiny_pipeline

    root = shared_folder()
    folder = root / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=root) as own:
            tiny_pipeline(name).save_pretrained(Path(own) / name)
            try:
                (Path(own) / name).rename(folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return str(folder)
