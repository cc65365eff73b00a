"""Work that is killed, or meets a full or read-only disk, at a call that changes files loses nothing that was finished,
and comes to the same end when it is started again. ``python tests/kills.py`` does it at all calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_work import ALL, Work, small
from file_faults import FAULTS, points

MOST = {"checkpoints": 16, "cache shards": 8, "pair shards": 6, "evaluation shards": 4, "export": 8, "run": 4}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_fault_at_a_call_loses_nothing_that_was_finished(
    make: Callable[[], Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch.setattr)
    work = make()
    calls = work.calls(tmp_path / "whole")
    wanted = work.left(tmp_path / "whole")
    assert len(calls) > 5
    for number, at in enumerate(points(len(calls), MOST[work.name])):
        fault = FAULTS[number % len(FAULTS)]
        work.survives(tmp_path / f"{fault}-{at}", calls, at, fault, wanted)
