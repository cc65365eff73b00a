"""What a method costs, counted on small networks: the numbers of its turns, and those of a real run."""

from __future__ import annotations

import pytest

from stepdistill.diffusion.path import FlowPath
from stepdistill.methods import find_method
from stepdistill.system.shipped import method_names
from stepdistill.testing.passes import passes_of_training


def of(name, updates, batch=1, times=(1.0,), **options):
    kind = find_method(name)
    return passes_of_training(kind, kind.Options(**options), times, updates, batch, FlowPath()).by_network


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_those_of_dmd_are_those_of_its_turns(guidance):
    """As tests/training/test_passes.py counts in a real run: three updates of regression, then three cycles of a fake
    turn and one of the student, which asks the guided teacher twice, and a regression beside it."""
    found = of("dmd", 9, batch=4, warm_start=3, fake_updates=1, pair_weight=0.1, guidance=guidance)
    assert found["student"] == {"with_graph": 3 * 4 + 3 * 2 * 4, "without_graph": 3 * 4}
    assert found["fake"] == {"with_graph": 3 * 4, "without_graph": 3 * 4}
    assert found["teacher"] == {"with_graph": 0, "without_graph": (1 + (guidance > 1)) * 3 * 4}


def test_a_drawn_number_of_calls_is_counted_in_the_mean():
    """Of K steps a rollout makes (K - 1) / 2 calls without a graph in the mean, and one with it."""
    found = of("dmd", 4000, times=(1.0, 0.75, 0.5, 0.25), fake_updates=1)
    assert found["student"]["with_graph"] == 2000
    assert found["student"]["without_graph"] == pytest.approx(2000 * (1.5 + 2.5), rel=0.25)


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_counted_and_says_nothing(name, capsys):
    kind = find_method(name)
    found = passes_of_training(kind, kind.Options(), kind.default_times, 40)
    assert found.total >= 40 and any(own["with_graph"] for own in found.by_network.values())
    assert capsys.readouterr().err == ""
