"""The script that changes the code knows every method, and does run tests."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.system.shipped import method_names

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "mutants.py"


def test_every_method_is_guarded_by_tests_that_there_are() -> None:
    guards: dict[str, list[str]] = runpy.run_path(str(ROOT / "tests" / "mutants_tables.py"))["GUARDS"]
    assert {f"stepdistill/methods/{name}.py" for name in method_names()} <= guards.keys()
    named = {*guards, *(test.partition("::")[0] for tests in guards.values() for test in tests)}
    assert not [name for name in named if not (ROOT / name).is_file()]


@pytest.mark.slow
def test_changes_are_tried_and_killed_by_a_test() -> None:
    command = [sys.executable, str(SCRIPT), "stepdistill/losses/distances.py", "--lines", "24-28"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = [line for line in done.stdout.splitlines() if line.startswith("killed ")]
    assert len(killed) >= 3 and all(" by tests/losses/test_distances.py::" in line for line in killed)
    assert done.stdout.endswith(f"{len(killed)} mutants, 0 survived\n")
