"""Several teachers in one group: none is mixed with another."""

from __future__ import annotations

import re
from typing import Any

from stepdistill.comparison.page import Comparison, as_json, html_page
from stepdistill.comparison.teachers import teachers
from stepdistill.training.run_report import RunReport


def run(
    name: str, teacher: str | None, guidance: float | None, fd: dict[str, float], **scores: Any
) -> RunReport:
    return RunReport.model_validate(
        {
            "name": name, "method": "lcm", "suite": "emoji@2", "n": 2000, "metrics": {"fd": "FD-emoji"},
            "student": {"fd": {"1": 2.0}}, "teacher": {"fd": fd, **scores}, "teacher_name": teacher,
            "guidance": guidance, "verification": "",
            **dict.fromkeys(("train_seconds", "wall_seconds", "peak_memory_bytes"), 1),
        }
    )  # fmt: skip


RUNS = [
    run("a", "emoji", 2.5, {"1": 6.0, "25": 1.1}),
    run("b", "emoji-flow", 2.5, {"1": 3.0, "25": 1.7}),
    run("c", "emoji", 1.0, {"1": 6.0, "25": 1.5}),
    run("d", "emoji", 2.5, {"1": 9.0, "4": 1.4}, kid={"4": 0.02}),  # another number is not taken
]


def compared(reports: list[RunReport]) -> Comparison:
    return Comparison(reports, [None] * len(reports))


def test_teachers_and_guidances_keep_their_own_scores() -> None:
    found = teachers([*RUNS, run("e", "other", 1.0, {})])
    assert [(each.name, each.guidance, each.scores) for each in found] == [
        ("emoji", 2.5, {"fd": {"1": 6.0, "4": 1.4, "25": 1.1}, "kid": {"4": 0.02}}),
        ("emoji-flow", 2.5, {"fd": {"1": 3.0, "25": 1.7}}),
        ("emoji", 1.0, {"fd": {"1": 6.0, "25": 1.5}}),
    ]
    labels = ["teacher emoji, guidance 2.5", "teacher emoji-flow, guidance 2.5", "teacher emoji, guidance 1"]
    assert [each.label for each in found] == labels
    (group,) = as_json(compared(RUNS))["groups"]
    assert group["teachers"] == [vars(each) for each in found] and "teacher" not in group
    page = html_page(compared(RUNS))
    (steps,) = re.findall(r'aria-label="(FD-emoji against steps[^"]*)"', page)
    assert all(label in steps and f">{label}<" in page for label in labels)
    assert teachers([run("a", None, None, {"1": 6.0})])[0].label == "teacher"


def test_one_teacher_is_the_teacher() -> None:
    page = html_page(compared([RUNS[0], RUNS[3]]))
    assert ">teacher<" in page and "teacher emoji, guidance 2.5" not in page


def test_of_many_runs_several_teachers_have_dots_of_their_own() -> None:
    many = [RUNS[0].model_copy(update={"name": f"r{i}"}) for i in range(11)]
    one, several = (html_page(compared(reports)) for reports in (many, [*many, RUNS[1]]))
    assert "the teacher in 25 steps: 1.1." in one
    assert (
        "teacher emoji, guidance 2.5, 25 steps: 1.1; teacher emoji-flow, guidance 2.5, 25 steps: 1.7."
        in several
    )
    assert "Dashed" not in several
