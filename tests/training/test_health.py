"""What is said of a student's health at the end, from its pictures, the teacher's, and the rows of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.export.shared import is_hub_name, shown_name, without_folders
from stepdistill.training.health import Vitals, health_of

TEACHER = Vitals(diversity=0.2, saturation=0.1)
GOOD, ALIKE, HARSH = Vitals(0.18, 0.12), Vitals(0.09, 0.1), Vitals(0.2, 0.31)


def row(update: int, network: str = "student", **more: object) -> dict[str, object]:
    return {"update": update, "network": network, "grad_norm": float(update), **more}


def test_the_verdict_is_of_the_end_and_warnings_before_it_are_kept() -> None:
    past = ALIKE.worries(TEACHER)
    rows = [row(0, x_std=1.0), row(1, x_std=0.5, worries=past), row(2, "fake score")]
    found = health_of(rows, 3, GOOD, TEACHER, skipped=1)
    assert found.verdict == "healthy" and found.sentence.endswith("there was collapse at update 2.")
    assert (found.diversity, found.teacher_diversity) == (0.18, 0.2)
    assert (found.saturation, found.teacher_saturation) == (0.12, 0.1)
    assert (found.x_std, found.grad_norm) == (0.5, 1.0)  # the student's, not those of what follows it
    assert [(worry.update, worry.what) for worry in found.worries] == [(2, *past)]
    assert found.line() == (
        "healthy: diversity 0.18 (teacher 0.20), saturation 12% (teacher 10%), 1 warning while it trained, "
        "1 file skipped"
    )


def test_what_the_end_shows_is_a_warning_once() -> None:
    """The last preview may have shown it already, after as many updates."""
    harsh = HARSH.worries(TEACHER)
    for rows in ([row(4)], [row(4, worries=harsh)]):
        found = health_of(rows, 5, HARSH, TEACHER)
        assert found.verdict == "oversaturation" and [found.sentence] == harsh
        assert [(worry.update, worry.what) for worry in found.worries] == [(5, *harsh)]
    assert health_of([], 5, Vitals(0.05, 0.5), TEACHER).verdict == "collapse, oversaturation"
    assert health_of([], 5, GOOD, TEACHER).line().endswith("saturation 12% (teacher 10%)")


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ("train --set data.prompts=/home/me/p.txt", "train --set data.prompts=p.txt"),
        ("train ./my.py --output ~/runs/x '/a b/c'", "train ./my.py --output x '/a b/c'"),
        ("train runs/x --teacher owner/name ../up/me/y", "train runs/x --teacher owner/name y"),
        ("see https://a.org/b/c", "see https://a.org/b/c"),
    ],
)
def test_folders_of_this_machine_are_left_out(given: str, shared: str) -> None:
    assert without_folders(given) == shared


def test_a_folder_is_called_by_its_name_and_a_hub_name_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", str(tmp_path / "models" / "mine"), "./mine", "~/mine"):
        assert not is_hub_name(name) and shown_name(name) == "mine"
    assert is_hub_name("owner/name") and shown_name("owner/name") == "owner/name"
    assert shown_name("emoji") == "emoji"
