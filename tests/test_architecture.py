"""Who may import whom: every package imports only what stands below it, at run time or for types alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "stepdistill"

# From the ground up; what shares a line does not import each other. `extend` is the face for methods and families of
# one's own.
FLOORS = """
errors
system
diffusion recipes pages pictures metrics attention
families features
networks
losses
methods data export
evaluation extend
training
comparison planning sharing watching testing
cli
"""
LEVEL = {name: level for level, line in enumerate(FLOORS.split("\n")) for name in line.split()}
# Used by train/make_teacher.py alone.
APART = {"teacher_training": {"errors", "system", "diffusion", "attention", "features", "training"}}


def imports(file: Path) -> set[tuple[str, int]]:
    """(package, line) of every import of our own, wherever it stands in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepdistill":
            parts = node.module.split(".")[1:]
            names = parts[:1] or [alias.name for alias in node.names]
            found |= {(name, node.lineno) for name in names if name != "__version__"}
    return found


def test_packages_import_downwards_alone() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own.startswith("__"):  # the package's face
            continue
        for name, line in imports(file):
            allowed = name in APART[own] if own in APART else LEVEL.get(name, 99) < LEVEL[own]
            if name != own and not allowed:
                wrong.append(f"{file.relative_to(PACKAGE)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_of_a_package_import_each_other_in_one_direction() -> None:
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(["stepdistill", *f.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): f
        for f in PACKAGE.rglob("*.py")
    }
    for name, file in names.items():
        reached = set()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:  # a module of a package, or a name of a module
                    inner = f"{node.module}.{alias.name}"
                    reached |= {inner if inner in names else node.module} & names.keys()
        graph[name] = reached - {name, "stepdistill"}
    while leaves := [name for name, below in graph.items() if not below]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: below - set(leaves) for name, below in graph.items()}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


LIGHT = (
    "cli recipes.recipe networks.find system.files system.shipped data.prompts training.preflight comparison.ranking "
    "comparison.train_all training.distil training.run_page watching.server"
).split()


def test_what_answers_at_once_imports_neither_torch_nor_matplotlib() -> None:
    imported = "".join(f"import stepdistill.{name}; " for name in LIGHT)
    code = f"import sys; {imported}print({{'torch', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
