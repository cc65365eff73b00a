"""docs/reference/families.md says what the code does."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from stepdistill.networks.teacher import PipelineTeacher

SCRIPT = Path(__file__).parents[2] / "train" / "families.py"


@pytest.mark.slow
def test_the_table_of_families_is_up_to_date(teacher_of: Callable[[str], PipelineTeacher]) -> None:
    """Else: python train/families.py"""
    made = runpy.run_path(str(SCRIPT))["text_of"](teacher_of)
    page = SCRIPT.parents[1] / "docs" / "reference" / "families.md"
    assert page.read_text("utf-8") == made
