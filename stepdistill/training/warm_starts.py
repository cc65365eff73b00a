"""Warm starts that several runs share: regression on the same pairs under the same settings is one computation.

The folder ``train.warm_starts`` keeps what a run was after its last update of that stage: student, optimiser, average,
passes, time and log, by a hash of everything that they follow from. A later run with the same hash goes on from there,
to the last bit as if it had made the stage itself; its time and its passes count as if it had, too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import stepdistill
from stepdistill.diffusion.philox import NAME
from stepdistill.losses.contract import MethodOptions
from stepdistill.losses.regression import WarmStartOptions
from stepdistill.networks.passes import Passes
from stepdistill.networks.roles import STUDENT
from stepdistill.system.log import STATS, read_stats, say
from stepdistill.system.processes import ALONE
from stepdistill.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from stepdistill.training.identity import ResolvedRecipe, identity, resolve
from stepdistill.training.run import Run


def settings_of(resolved: ResolvedRecipe) -> dict[str, Any] | None:
    """What of a recipe its warm start follows from; None where it has none that others could share."""
    recipe, kind, options = resolved.recipe, resolved.kind, resolved.options
    updates = kind.shared_start(options)
    terms = recipe.terms
    if not 0 < updates <= recipe.train.updates or terms != type(terms)():
        return None
    # Another length moves a rate that falls towards the run's end alone, and when a checkpoint is made moves nothing.
    free = {"checkpoint_every", *(["updates"] if recipe.train.schedule == "constant" else [])}
    return {
        "teacher": recipe.teacher,
        "family": recipe.family,
        "options": _of_regression(options),
        "student": recipe.student.model_dump(mode="json"),
        "times": list(recipe.student.times or kind.usual_times(recipe.student.steps)),
        "data": recipe.data.model_dump(mode="json", exclude={"pairs", "damaged", "images"}),
        "train": identity(recipe).train.model_dump(mode="json", exclude=free),
    }


def _of_regression(options: MethodOptions) -> dict[str, Any]:
    return options.model_dump(mode="json", include=set(WarmStartOptions.model_fields))


@dataclass(frozen=True)
class WarmStart:
    """The warm start of a run.

    Attributes:
        run: whose.
        updates: its length.
        place: where it is kept.
    """

    run: Run
    updates: int
    place: Path

    @staticmethod
    def of(run: Run) -> WarmStart | None:
        """That of a run at its start; None where it has none to share, where no folder is given, and of several
        processes."""
        recipe, method = run.recipe, run.objective.method
        settings = settings_of(resolve(recipe)) if recipe.train.warm_starts else None
        if settings is None or run.parallel.processes != ALONE:
            return None
        inputs = {name: value for name, value in (run.inputs or {}).items() if name != "data.images"}
        key = {
            **settings,
            "inputs": inputs,
            "times": list(method.times),
            "draws": NAME,
            "versions": [stepdistill.__version__, torch.__version__],
            "machine": [str(run.parallel.device), torch.get_num_threads()],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        updates = method.shared_start(method.options)
        return WarmStart(run, updates, Path(recipe.train.warm_starts or "") / name)

    def take_over(self) -> None:
        """Goes on from what is kept, where there is something, and the run's time suffices for it.

        Raises:
            UserError: it is damaged.
        """
        found, run = checkpoints_in(self.place), self.run
        if not found:
            return
        tensors, state = load_checkpoint(found[-1])
        if 0 < run.options.budget_seconds <= state["seconds"]:
            return
        run.roles.load({**run.roles.state(), **tensors.pop(STUDENT)})
        for name, values in tensors.items():
            run.parts[name].load(values)
        run.step, run.seconds, run.warm_start_of = self.updates, state["seconds"], state["made_by"]
        run.own_passes.add(Passes(state["passes"]))
        rows = "".join(json.dumps(row) + "\n" for row in state["rows"])
        (run.folder.root / STATS).write_text(rows, encoding="utf-8")
        say(f"warm start: {self.updates:,} updates that {state['made_by']} has made, of the same computation")

    @property
    def due(self) -> bool:
        """Whether the run has just made it, and it is to be kept."""
        return self.run.step == self.updates and not checkpoints_in(self.place)

    def keep(self) -> None:
        """Keeps it."""
        run, student = self.run, f"{STUDENT}."
        own = (f"optimizer-{STUDENT}", f"masters-{STUDENT}", "ema")
        tensors = {name: part.state() for name, part in run.parts.items() if name in own}
        tensors[STUDENT] = {k: v for k, v in run.roles.state().items() if k.startswith(student)}
        state = {
            "seconds": run.seconds,
            "passes": run.own_passes.by_network,
            "made_by": run.folder.root.name,
            "rows": read_stats(run.folder.root)[: self.updates],
        }
        save_checkpoint(self.place, self.updates, tensors, state, keep=1)
