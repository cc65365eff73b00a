"""Scores in the eyes of a network that a loss looked through: they are named, marked, and rank nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepdistill.comparison.page import Comparison, html_page
from stepdistill.comparison.ranking import Group, groups, ranks
from stepdistill.comparison.table import text_tables
from stepdistill.evaluation.conflicts import conflicts, loss_saw
from stepdistill.evaluation.suite import load_suite
from stepdistill.losses.contract import MethodOptions
from stepdistill.methods.gndm import GNDM
from stepdistill.pages.metric_names import conflict_sentence
from stepdistill.recipes.term_options import TermOptions
from stepdistill.system.emoji import features_folder
from stepdistill.training.run_report import RunReport

ASKED = load_suite("emoji").asked("emoji")
IN_CLIP = {"fd", "kid", "precision", "recall", "density", "coverage", "clip_score"}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"reward": "clip:emoji"}, {}),  # it has no weight
        ({"reward_weight": 1}, dict.fromkeys(IN_CLIP, "terms.reward")),
        ({"reward_weight": 1, "reward": f"clip:{features_folder()}"}, dict.fromkeys(IN_CLIP, "terms.reward")),
        ({"reward_weight": 1, "reward": ["ink", "colour"]}, {}),  # rules: no network sees for them
        ({"perceptual_weight": 1}, dict.fromkeys(IN_CLIP, "terms.perceptual")),
        (
            {"perceptual_weight": 1, "reward_weight": 1},
            dict.fromkeys(IN_CLIP, "terms.perceptual, terms.reward"),
        ),
        ({"gan_weight": 1}, {}),  # the teacher's features
    ],
)
def test_a_term_conflicts_with_the_scores_of_its_network_by_the_weights(
    terms: dict[str, Any], expected: dict[str, str]
) -> None:
    assert conflicts(ASKED, TermOptions(**terms).networks()) == expected


def test_rewards_that_a_method_reads_for_itself_need_no_weight_of_the_term() -> None:
    terms = TermOptions(reward=["judge", "ink"])
    assert terms.networks() == {}
    assert terms.networks(rewarded=True) == {"judge": "terms.reward"}
    assert "reward" in GNDM.Options(climb_weight=0.3).needs
    assert "reward" not in GNDM.Options().needs


def test_a_method_says_for_itself_through_what_it_looks() -> None:
    class Options(MethodOptions):
        eye: str = "judge"

        @property
        def networks(self) -> dict[str, str]:
            return {self.eye: "options.eye"}

    assert MethodOptions().networks == {}
    assert set(conflicts(ASKED, Options().networks)) == {"second_fd", "second_fit"}
    assert conflicts(ASKED, {"clip:/nowhere": "terms.reward"}) == {}


def test_an_evaluation_of_a_run_asks_the_runs_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"loss_saw": {"emoji": "terms.reward"}}))
    assert loss_saw(tmp_path) == loss_saw(tmp_path / "student") == {"emoji": "terms.reward"}
    assert loss_saw("emoji") == loss_saw(tmp_path / "nowhere") == loss_saw(object()) == {}


def run(name: str, fd: float, judge: float | None, **changes: Any) -> RunReport:
    version = 1 if judge is None else 2
    scores = {"fd": fd, "fd_se": 0.01, "clip_score": 0.8} | (
        {} if judge is None else {"second_fd": judge, "second_fd_se": 0.01, "second_fit": 2.0}
    )
    names = {"fd": "FD-emoji", "clip_score": "CLIP-emoji", "second_fd": "FD-judge", "second_fit": "judge fit"}
    return RunReport(
        name=name, method="lcm", suite=f"emoji@{version}", n=2000, metrics=names,
        student={key: {"1": value} for key, value in scores.items()}, gap_closed={"1": 1 - fd / 10},
        protocol={"suite_sha256": "x", "resize": "clean"}, verification="", train_seconds=1, wall_seconds=1,
        peak_memory_bytes=1, **changes,
    )  # fmt: skip


SAW = {"conflicts": {"fd": "terms.reward", "clip_score": "terms.reward"}}


def names(group: Group) -> list[str]:
    return [row.name for row in group.rows]


def shown(reports: list[RunReport]) -> tuple[Group, str, str]:
    (group,) = groups(reports)
    page = html_page(Comparison(reports, [None] * len(reports)))
    return group, text_tables([group]), page


def test_a_run_is_not_ranked_by_the_network_that_its_loss_saw_but_all_by_the_judge() -> None:
    group, text, page = shown([run("a", 3, 5), run("rewarded", 1, 7, **SAW), run("b", 4, 4)])
    assert names(group) == ["b", "a", "rewarded"]  # by FD-judge; by FD-emoji it would be first
    assert [ranks(row, group.rows) for row in group.rows] == [(1, 1), (2, 2), (3, 3)]
    for said in (text, page):
        assert (
            "Ranked by FD-judge, as the loss of rewarded (terms.reward) looked through the network of" in said
        )
        assert "1.000 ± 0.010*" in said and "3.000 ± 0.010" in said and "0.900*" in said
        assert "3.000 ± 0.010*" not in said
        assert "FD-judge" in said and "judge fit" in said
    plain, text, _ = shown([run("a", 3, 5), run("b", 4, 4)])
    assert names(plain) == ["a", "b"] and plain.notes == [] and "*" not in text


def test_where_not_all_have_the_judge_the_run_stands_behind_unranked() -> None:
    for other in (run("b", 4, None), run("b", 4, 4, conflicts={"second_fd": "options.eye"})):
        group, text, _ = shown([run("rewarded", 1, 7, **SAW), other, run("a", 3, 5)])
        assert names(group) == ["a", "b", "rewarded"]
        assert [ranks(row, group.rows) for row in group.rows] == [(1, 1), (2, 2), None]
        assert "Not ranked, and behind the others: rewarded (terms.reward)" in text


def test_results_of_version_1_stand_with_those_of_version_2_and_say_what_they_are() -> None:
    group, text, page = shown([run("old", 3, None), run("new", 4, 5)])
    assert group.title == "suite emoji@1, emoji@2, 2,000 images" and names(group) == ["old", "new"]
    head, old, new = (line.split() for line in text.splitlines()[:3])
    assert "suite" in head and "emoji@1" in old and "emoji@2" in new and "5.000" in new and "-" in old
    assert "emoji@1" in page and "FD-judge" in page
    assert (
        len(groups([run("a", 3, 5), run("b", 3, 5).model_copy(update={"protocol": {"suite_sha256": "y"}})]))
        == 2
    )


def test_the_sentence_names_scores_and_keys() -> None:
    said = conflict_sentence(SAW["conflicts"], {"fd": "FD-emoji"})
    assert "(terms.reward)" in said and said.endswith("FD-emoji, CLIP score.") and said.startswith("* ")
    assert conflict_sentence({}, {}) == ""
