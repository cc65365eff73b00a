"""Runs the notebook: python docs/generate/run_notebook.py NOTEBOOK FOLDER

The runs that it makes stay in FOLDER. A copy with its outputs is written there; the file itself is not changed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LIMIT_SECONDS = 600
"""Of one cell, on a loaded machine."""


def run(file: Path, folder: Path) -> float:
    """Runs all cells in the folder, and gives the seconds that it took.

    Raises:
        CellExecutionError: a cell fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(file, as_version=4)
    began = time.monotonic()
    NotebookClient(notebook, timeout=LIMIT_SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    nbformat.write(notebook, folder / file.name)
    return time.monotonic() - began


if __name__ == "__main__":
    print(f"{sys.argv[1]}: {run(Path(sys.argv[1]), Path(sys.argv[2])):.0f} s")
