"""How long a recipe takes on this machine: three units of it are timed, at its start, in its middle and at its end.

A unit is as many updates as it takes for every network to have had one. What it writes lies in a folder that goes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator
from torch import Tensor

from stepdistill.attention.kernels import attention
from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import PairOptions
from stepdistill.losses.objective import shown_name
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import ResolvedRecipe, resolve
from stepdistill.training.run import Run
from stepdistill.training.training_data import training_data
from stepdistill.training.update import update

LONGEST = 12
"""Most updates of a unit."""


@dataclass(frozen=True)
class Trial:
    """What a recipe takes.

    Attributes:
        pairs, pair_seconds: how many pairs of the teacher it draws, and the time of all of them.
        updates: of each network, by the name that people know.
        update_seconds: of all of them.
    """

    pairs: int
    pair_seconds: float
    updates: dict[str, int]
    update_seconds: float


def trial(resolved: ResolvedRecipe) -> Trial:
    """Times a recipe. Pairs that are there already, and the stage that turns the output of the student's network, are
    not looked at: all pairs are counted as drawn, and the stage is not counted.

    Raises:
        UserError: the recipe does not run.
    """
    import torch

    recipe, options = resolved.recipe, resolved.options
    wanted = options.pairs if isinstance(options, PairOptions) else PairOptions().pairs
    few = min(wanted, 64)
    short = recipe.model_copy(
        update={
            "options": recipe.options | ({"pairs": few} if "pairs" in recipe.options else {}),
            "data": recipe.data.model_copy(update={"pairs": None}),
            "student": recipe.student.model_copy(update={"output": "teacher"}),
        }
    )
    with TemporaryDirectory() as folder:
        run = assemble(resolve(short), Accelerator(cpu=not torch.cuda.is_available()))
        count = recipe.train.updates
        turns = Counter(run.objective.turn(step).network for step in range(count))
        data = training_data(run, Path(folder))
        pairs, drawing = 0, 0.0
        if data.pairs is not None:
            pairs, drawing = wanted, _pair_seconds(data.pairs, data.condition) * wanted
        seconds = _unit_seconds(run, data, Path(folder))
    mean = sum(seconds.values()) / len(seconds)
    return Trial(
        pairs=pairs,
        pair_seconds=drawing,
        updates={shown_name(name): number for name, number in turns.items()},
        update_seconds=sum(number * seconds.get(name, mean) for name, number in turns.items()),
    )


def _pair_seconds(pairs: PairCache, condition: Callable[[Tensor], Condition]) -> float:
    """Time of a pair: the few are drawn once more, as the first time all prompts are encoded, too."""
    for file in pairs.folder.glob("*.safetensors"):
        file.unlink()
    began = time.perf_counter()
    pairs.make(condition)
    return (time.perf_counter() - began) / pairs.count


def _unit_seconds(run: Assembled, data: Data, folder: Path) -> dict[str, float]:
    """Network -> seconds of its update, the mean over the units."""
    recipe, objective, device = run.recipe, run.objective, run.accelerator.device
    found, state, options = dict[str, list[float]](), Run(objective, recipe, folder), recipe.train
    last = max(0, options.updates - LONGEST)
    with (
        attention(options.attention, device, options.precision),
        objective.method.roles.checkpointed() if options.checkpointing else nullcontext(),
    ):
        for first in dict.fromkeys((0, last // 2, last)):
            seen: set[str] = set()
            steps = range(first, min(first + LONGEST, options.updates))
            with closing(data.batches(steps, 0, options.batch, options.batch)) as batches:
                for step, batch in zip(steps, batches, strict=True):
                    turn = objective.turn(step)
                    warm = turn.network in found  # the first update of a network also makes what it keeps
                    began = time.perf_counter()
                    float(update(state, turn, batch, 0.0)[1])
                    if warm:
                        seen.add(turn.network)
                    found.setdefault(turn.network, []).append(time.perf_counter() - began)
                    if seen >= objective.trained.keys():
                        break
    return {name: sum(each[1:]) / len(each[1:]) if each[1:] else each[0] for name, each in found.items()}
