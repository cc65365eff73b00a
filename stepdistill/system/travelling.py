"""Files of ours that travel inside a student where no stock diffusers class does what it needs; see ``pipelines/``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from stepdistill.system.files import sha256_of
from stepdistill.system.shipped import content_folder

REASONS = {
    "phased_experts.py": (
        "its network is one expert for each stretch of its steps, and no stock diffusers class changes weights between "
        "steps"
    ),
    "routed_experts.py": (
        "its network is several students, of which each prompt is drawn by the one that learnt it, and no stock "
        "diffusers class chooses its weights by the prompt"
    ),
    "given_steps.py": (
        "its scheduler takes the first steps with the noise that the teacher predicts and the others as the student "
        "does, which no stock scheduler does"
    ),
    "flow_consistency.py": (
        "its scheduler has the grid of its few steps, or fresh noise between its steps, which no stock scheduler has "
        "in this pipeline"
    ),
}
"""The files in pipelines/, and why each travels, as a model card says it."""


FORMER = frozenset(
    {
        "e324c55645c0ed8fc85ff732f915940cb773f19a73946392eddbc0b72306d025",
        "a273bc636a11c19460b85ced7a623ec5ce0379f3ae90ebc0e6bf44236a7773db",
        "235a813c17a1963ada83f5b5bfc17fc00b34c3f4faa8f80ba6b6dc6c95659e6a",
        "e9a8dd14b58aa5ff9b40018c8a2068bb4d1d8526ba23b4b099c687e2b6c03a62",
    }
)
"""SHA-256 of files of pipelines/ as earlier versions had them; students that carry them still load."""


def travelling_module(name: str) -> Any:
    """The module pipelines/``name``.py, loaded by its path under its bare name, which diffusers writes into folders."""
    if name not in sys.modules:
        file = content_folder("pipelines") / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def travelling_code(folder: Path) -> list[Path]:
    """The Python files of a student folder, which diffusers runs only with ``trust_remote_code=True``."""
    return sorted(folder.rglob("*.py"))


def is_own_code(file: Path) -> bool:
    """Whether a Python file of a student folder is, byte for byte, one of pipelines/, now or in an earlier version."""
    shipped = content_folder("pipelines") / file.name
    if not shipped.is_file():
        return False
    return shipped.read_bytes() == file.read_bytes() or sha256_of(file) in FORMER
