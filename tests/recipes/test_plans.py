"""docs/reference/plans.md stands for the recipes as they are."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def plans() -> Any:
    spec = importlib.util.spec_from_file_location("plans", Path(__file__).parents[2] / "train" / "plans.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_of_a_real_teacher_is_planned_as_it_is(plans: Any) -> None:
    """Else: python train/plans.py"""
    rows = json.loads(plans.ROWS.read_text("utf-8"))
    assert list(rows) == plans.names()
    for name, row in rows.items():
        assert row["asked"] == plans.asked(name), name
    assert plans.FILE.read_text("utf-8") == plans.text(rows)
