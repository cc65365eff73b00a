"""Which places of a ranking are sure, and which distance ranks."""

from __future__ import annotations

import math
import re

import pytest
import torch

from stepdistill.comparison.page import Comparison, html_page
from stepdistill.comparison.ranking import Group, Row, groups, ranks
from stepdistill.comparison.table import NO_ERRORS, RANKS, SOME_ERRORS, notes, text_tables
from stepdistill.evaluation.scores import AGAINST
from stepdistill.training.run_report import RunReport

SEEN = {"fd": "terms.reward", "kid": "terms.reward"}


def run(
    name: str, fd: float, error: float | None, *, kid: float | None = None, **changes: object
) -> RunReport:
    scores = {"fd": fd, "fd_se": error, "kid": kid, "kid_se": None if kid is None else 0.01}
    return RunReport.model_validate(
        {
            "name": name, "method": "lcm", "suite": "own@1", "n": 64, "metrics": {"fd": "FD-emoji"},
            "student": {key: {"1": value} for key, value in scores.items()}, "verification": "",
            **dict.fromkeys(("train_seconds", "wall_seconds", "peak_memory_bytes"), 1), **changes,
        }
    )  # fmt: skip


def group_of(*reports: RunReport) -> Group:
    (group,) = groups(reports)
    return group


def places(*reports: RunReport) -> list[tuple[int, int] | None]:
    rows = group_of(*reports).rows
    return [ranks(row, rows) for row in rows]


@pytest.mark.parametrize(("apart", "sure"), [(0.99, False), (1.01, True)])
def test_a_difference_is_sure_above_twice_the_root_of_the_summed_squares(apart: float, sure: bool) -> None:
    """Errors 0.3 and 0.4: that root is 0.5. Their sum, 0.7, would be passed by both."""
    found = places(run("a", 2.0, 0.3), run("b", 2.0 + apart, 0.4))
    assert found == ([(1, 1), (2, 2)] if sure else [(1, 2), (1, 2)])


def test_of_equal_pairs_five_in_a_hundred_are_told_apart() -> None:
    values = 5 + torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double()
    template = group_of(run("a", 5.0, 1.0)).rows[0]
    told = 0
    for pair in values.tolist():
        rows = [
            Row(**{**vars(template), "name": name, "fd": fd}) for name, fd in zip("ab", pair, strict=True)
        ]
        told += ranks(rows[0], rows) != (1, 2)
    assert told / 1000 == pytest.approx(0.0455, abs=3 * math.sqrt(0.0455 / 1000))


def test_without_errors_no_place_is_sure_and_the_table_says_so() -> None:
    bare = [run("a", 1.0, None), run("b", 9.0, None), run("c", 50.0, None)]
    assert places(*bare) == [(1, 3)] * 3
    assert notes(group_of(*bare).rows) == [RANKS, NO_ERRORS]
    assert [row.name for row in group_of(*bare).rows] == ["a", "b", "c"]
    page = html_page(Comparison(bare, [None] * 3))
    assert "<td>1-3</td>" in page and "No standard errors are known, so no place is sure" in page
    mixed = [run("a", 1.0, 0.1), run("b", 9.0, None), run("c", 50.0, 0.1)]
    assert places(*mixed) == [(1, 2), (1, 3), (2, 3)]
    assert SOME_ERRORS in notes(group_of(*mixed).rows)
    known = group_of(run("a", 1.0, 0.1), run("b", 9.0, 0.1)).rows
    assert notes(known) == ["± is one standard error."]


def test_against_the_teachers_pictures_runs_are_ranked_by_the_kernel_distance() -> None:
    """``same`` draws roughly its teacher's pictures; ``other`` other ones, of nearly the teacher's distribution."""
    pair = [
        run("same", 2.0, 0.1, kid=0.2, against=AGAINST),
        run("other", 9.0, 0.1, kid=0.02, against=AGAINST),
    ]
    found = group_of(*pair)
    assert [row.name for row in found.rows] == ["other", "same"]
    assert [ranks(row, found.rows) for row in found.rows] == [(1, 1), (2, 2)]
    assert found.notes[0].startswith("Ranked by KID, ") and found.notes[0] in text_tables([found])
    real = group_of(*(report.model_copy(update={"against": "real images"}) for report in pair))
    assert [row.name for row in real.rows] == ["same", "other"] and not real.notes


@pytest.mark.parametrize("least", [0.02, -0.001])
def test_charts_show_the_distance_that_ranks(least: float) -> None:
    """A kernel distance without bias may be below zero."""
    pair = [
        run("same", 2.0, 0.1, kid=0.2, against=AGAINST),
        run("other", 9.0, 0.1, kid=least, against=AGAINST),
    ]
    charts = re.findall(r'<svg role=img aria-label="([^"]*)"', html_page(Comparison(pair, [None] * 2)))
    assert [label.partition(".")[0] for label in charts] == ["KID against steps", "KID against training time"]
    assert f"{least:g}" in charts[0]


def test_a_run_whose_loss_saw_the_network_stands_behind_those_that_rank_by_the_kernel_distance() -> None:
    found = group_of(
        run("rewarded", 1.0, 0.1, kid=0.01, against=AGAINST, conflicts=SEEN),
        run("a", 3.0, 0.1, kid=0.3, against=AGAINST),
        run("b", 3.0, 0.1, kid=0.2, against=AGAINST),
    )
    assert [row.name for row in found.rows] == ["b", "a", "rewarded"]
    assert [ranks(row, found.rows) for row in found.rows] == [(1, 1), (2, 2), None]
    assert any("behind the others: rewarded (terms.reward)" in note for note in found.notes)


def second(name: str, fd: float, other: float | None, **changes: object) -> RunReport:
    """A run that was seen by a second network, whose distance is ``other``."""
    made = run(name, fd, 0.1, **changes)
    names = {"fd": "FD-emoji", "second_fd": "FD-judge", "second_fit": "judge"}
    return made.model_copy(update={"student": {**made.student, "second_fd": {"1": other}}, "metrics": names})


def test_a_loss_that_looked_through_the_first_network_leaves_the_ranking_to_the_second() -> None:
    saw = {"fd": "terms.reward"}
    found = group_of(second("a", 1.0, 5.0, conflicts=saw), second("b", 3.0, 4.0))
    assert [row.name for row in found.rows] == ["b", "a"]
    assert list(found.notes) == [
        "Ranked by FD-judge, as the loss of a (terms.reward) looked through the network of FD-emoji.",
        "* The run's own loss looked through the network of this score, which flatters it.",
    ]
    assert found.rows[0].second_names == ("FD-judge", "judge")
    # Where all looked through the first, the second ranks too; where none did, the first.
    every = group_of(second("a", 1.0, 5.0, conflicts=saw), second("b", 3.0, 4.0, conflicts=saw))
    assert [row.name for row in every.rows] == ["b", "a"]
    assert [row.name for row in group_of(second("a", 1.0, 5.0), second("b", 3.0, 4.0)).rows] == ["a", "b"]
    # Where it looked through both, or one run has no second score, the first ranks those that it may.
    for other in ({**saw, "second_fd": "terms.reward"}, None):
        one = second("a", 1.0, 5.0, conflicts=other or saw)
        lacks = second("b", 3.0, None if other is None else 4.0)
        kept = group_of(one, lacks, second("c", 2.0, 9.0))
        assert [row.name for row in kept.rows] == ["c", "b", "a"]
        assert kept.notes[0] == (
            "Not ranked, and behind the others: a (terms.reward), whose loss looked through the network of FD-emoji; "
            "not every run here has FD-judge, or a loss looked through its network, too."
        )
        assert kept.notes[1].startswith("* The run's own loss")
    nameless = run("a", 1.0, 0.1, conflicts=saw, metrics={})
    (note, _) = group_of(nameless, run("b", 2.0, 0.1, metrics={})).notes
    assert "the network of FD; not every run here has the second features' FD, or" in note
    assert group_of(run("a", 1.0, 0.1, metrics={})).rows[0].second_names == ("FD 2", "fit 2")


def test_a_run_without_the_distance_stands_last_and_one_at_zero_first() -> None:
    found = group_of(run("none", None, None, kid=0.5), run("some", 0.5, 0.1), run("zero", 0.0, 0.1))  # type: ignore[arg-type]
    assert [row.name for row in found.rows] == ["zero", "some", "none"]


def test_a_place_is_not_sure_at_exactly_twice_the_error() -> None:
    assert places(run("a", 1.0, 0.0), run("b", 1.0, 0.0)) == [(1, 2), (1, 2)]


def test_trainings_of_other_seeds_become_one_row_of_means() -> None:
    reports = [
        run(
            f"m-{seed}", 2.0, 0.1, updates=updates, better={"mine": "lower", "bare": "lower"},
            passes={"teacher": {"with_graph": 0, "without_graph": passes}},
            student={
                "fd": {"1": 2.0}, "mine": {"1": mine}, "mine_se": {"1": error}, "bare": {"1": None},
                "seconds_per_image": {"1": 0.25},
            },
        )
        for seed, updates, passes, mine, error in ((0, 100, 30, 1.0, 0.3), (1, 103, 33, 4.0, 0.4))
    ]  # fmt: skip
    (group,) = groups(reports, {"m-0": "m", "m-1": "m"})
    (row,) = group.rows
    assert (row.name, row.seeds, row.updates, row.passes, row.ms_per_image) == ("m", 2, 102, 32, 250.0)
    assert row.own == {"mine": (2.5, pytest.approx(math.sqrt(0.125))), "bare": (None, None)}
    assert row.deviation == {"fd": 0.0, "mine": pytest.approx(4.5**0.5)}


def test_what_sets_groups_apart_is_told_without_the_hash_that_says_no_more() -> None:
    one, other, third = (
        run(name, 1.0, 0.1, protocol=protocol)
        for name, protocol in (
            ("a", {"suite_sha256": "1", "features_sha256": "x"}),
            ("b", {"suite_sha256": "2", "features_sha256": "y"}),
            ("c", {"suite_sha256": "3", "features_sha256": "x"}),
        )
    )
    first, second, last = groups([one, other, third])
    assert not first.apart
    assert [why.partition(" ")[0] for why in second.apart] == ["protocol.features_sha256"]
    assert [why.partition(" ")[0] for why in last.apart] == ["protocol.suite_sha256"]
