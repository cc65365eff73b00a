"""What the launcher says of the processes, before any is started."""

from __future__ import annotations

import pytest

from stepdistill.system.processes import ALONE, Processes, launched, told


def test_the_launchers_words_are_read_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert told() == ALONE and launched() is ALONE
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert told() == Processes(3, 8) and not told().main
