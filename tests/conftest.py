"""Tiny teachers of every family, built once; tests treat them as read-only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from stepdistill.teacher import PipelineTeacher

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def teacher_of() -> Callable[[str], PipelineTeacher]:
    """teacher_of(name) for a name of ``tiny.PIPELINES``: the same object at every call."""
    from tiny import tiny_teacher

    return functools.cache(tiny_teacher)
