"""When the steps of a run are read from a device."""

from __future__ import annotations

import pytest
import torch

from stepdistill.system.processes import ALONE
from stepdistill.training.parallel import OneProcess
from stepdistill.training.unread import GPU_STEPS, Unread, steps_between


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 10), (0.1, 10), (1.0, 5), (2.6, 1), (90.0, 1)])
def test_five_seconds_pass_at_most_between_two_reads(seconds: float, steps: int) -> None:
    """Or one step, if that takes longer."""
    assert steps_between(GPU_STEPS, seconds) == steps


@pytest.mark.parametrize(
    ("device", "asked_for", "after"), [("cpu", None, 1), ("cuda", None, 2), ("cuda", 4, 4)]
)
def test_steps_between_reads_follow_how_long_steps_take(
    device: str, asked_for: int | None, after: int
) -> None:
    """Once two reads have said it, and not where the user says it."""
    now = 0.0
    parallel = OneProcess(ALONE, torch.device(device))
    unread = Unread(parallel, lambda: now, asked_for)
    parallel.device = torch.device("cpu")  # the numbers are there
    before = unread.every
    for step in range(4):
        now += 2.5
        unread.add(step, "student", [{"loss": torch.tensor(1.0)}], torch.tensor(1.0), 1e-4)
        if step % 2:
            rows, _ = unread.read(False)
            assert [row.step for row in rows] == [step - 1, step]
            assert unread.every == (before if step == 1 else after)
