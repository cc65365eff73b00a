"""Tiny teachers of every family, built once; tests treat them as read-only."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fresh import FreshProcesses
from tiny_folder import shared_folder

if TYPE_CHECKING:
    import subprocess

    from stepdistill.networks.teacher import PipelineTeacher

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The processes of pytest-xdist share the cores out, before any of them imports torch: more threads than cores are slow.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


shared_folder()  # made here, as the processes of pytest-xdist are told of it by the environment


def pytest_unconfigure() -> None:
    gc.unfreeze()


_imported = 0


@pytest.fixture(autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """What tests import (torch, diffusers, transformers) is a million objects that live as long as the process: the
    collector need not go through them over and over."""
    yield
    global _imported
    if len(sys.modules) > _imported + 300:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(scope="session")
def teacher_of() -> Callable[[str], PipelineTeacher]:
    """teacher_of(name) for a name of ``tiny.PIPELINES``: the same object at every call."""
    from tiny import tiny_teacher

    return functools.cache(tiny_teacher)


@pytest.fixture(scope="session")
def fresh_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """One process that has imported diffusers and never stepdistill, and forks for every program."""
    processes = FreshProcesses(tmp_path_factory.mktemp("fresh"))
    yield processes
    processes.close()


@pytest.fixture(autouse=True)
def verify_in_a_fork(
    request: pytest.FixtureRequest, fresh_processes: FreshProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``verify`` draws in a fork of that process; in one of its own where a test is marked ``own_process``."""

    def run(
        program: str, arguments: list[str], folder: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        return fresh_processes.run(program, arguments, folder)

    if request.node.get_closest_marker("own_process") is None:
        monkeypatch.setattr("stepdistill.export.verify.in_a_fresh_process", run)
