"""A one-step student of a tiny teacher in the folder of a run, exported once; tests change copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from shared_student import student_run

from stepdistill.networks.teacher import PipelineTeacher


@pytest.fixture(scope="session")
def one_step_run(
    teacher_of: Callable[[str], PipelineTeacher], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder; read only."""
    return student_run(teacher_of("sd"), (1.0,), tmp_path_factory.mktemp("sharing") / "tiny_one")


@pytest.fixture
def run(one_step_run: Path, tmp_path: Path) -> Path:
    """The same to change."""
    return Path(shutil.copytree(one_step_run, tmp_path / "tiny_one"))
