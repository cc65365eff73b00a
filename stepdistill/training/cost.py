"""The network passes of a run before its first update: its pairs, and its start in another output kind.

Both may lie in a cache, where another run has put them. They count all the same: a run costs what it would by itself.
"""

from __future__ import annotations

import torch

from stepdistill.data.batches import Data
from stepdistill.data.pairs import passes_of_pairs
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.passes import Passes
from stepdistill.training.assemble import Assembled
from stepdistill.training.output_matching import SAMPLE_STEPS


def passes_before(run: Assembled, data: Data) -> Passes:
    """The passes by who was called: ``pairs``, and for the other output kind ``start``.

    Args:
        run: what will be trained.
        data: what it is trained on.
    """
    found, teacher, student = Passes(), run.teacher, run.recipe.student
    cond = data.condition(torch.zeros(1, dtype=torch.long))
    if data.pairs is not None:
        found.add(passes_of_pairs(teacher, cond, data.pairs.options), who="pairs")
    if run.method.roles.turned:
        samples = PairOptions(
            guidance=run.options.guidance,
            pairs=student.output_samples,
            pair_steps=SAMPLE_STEPS,
            pair_solver="dpm++2m",
        )
        found.add(passes_of_pairs(teacher, cond, samples), who="start")
        rows = student.output_updates * run.recipe.train.batch
        found.count("start", rows, graph=False)  # the teacher's, which the network is regressed on
        found.count("start", rows, graph=True)
    return found
