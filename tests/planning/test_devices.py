"""On a GPU of fake tensors the measured updates have no operator between two devices."""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from stepdistill.planning.fake import fake_tensors
from stepdistill.planning.from_configs import pipeline_of
from stepdistill.planning.live_bytes import LiveBytes
from stepdistill.planning.unit import unit_of

GPU = torch.device("cuda", 0)


def bench() -> Any:
    file = Path(__file__).parents[2] / "eval" / "bench" / "plan.py"
    spec = importlib.util.spec_from_file_location("bench_plan", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnGpu:
    """What is made inside the ``with`` is fake and on the GPU."""

    def __init__(self, mode: Any) -> None:
        self.mode, self.open = mode, list[ExitStack]()

    def __enter__(self) -> None:
        self.open.append(stack := ExitStack())
        stack.enter_context(self.mode)
        stack.enter_context(GPU)

    def __exit__(self, *error: object) -> None:
        self.open.pop().close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl-lora", "sd35-medium-full", "flux-lora"])
def test_a_measured_update_is_on_the_device_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's forward passes: torch makes no graphs of fake tensors of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    rows = bench()
    teacher, sets = rows.ROWS[name]
    given = rows.smaller(teacher, tmp_path)
    recipe = rows._recipe(given, "dmd", [*sets, "train.batch=1"])
    with fake_tensors({}, LiveBytes()) as mode, torch.no_grad():
        planned = pipeline_of(given, OnGpu(mode))
        unit = unit_of(recipe, planned.pipe, planned.family, GPU, mode)
        with mode:
            unit.run()
            batch = unit.batch()
            turn, _ = unit.turns()[-1]
            with unit.training(recipe.train.attention):
                loss, _ = unit.objective.loss(turn, batch)  # calls all networks
    assert turn.network == "student" and loss.device == GPU
