"""A tiny teacher as a folder, for runs that are given a place and not a pipeline."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

SHARED = "STEPDISTILL_TESTS"
"""The environment variable of the folder that all processes of a test session share."""


@cache
def tiny_folder(name: str) -> str:
    """The folder of ``tiny_pipeline(name)``, saved by whichever process of a session comes first."""
    from tiny import tiny_pipeline

    root = Path(os.environ.get(SHARED) or tempfile.gettempdir())
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
