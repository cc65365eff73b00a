"""Warm starts that several runs share: regression on the same pairs under the same settings is one computation.

The folder ``train.warm_starts`` keeps what a run was after its last update of that stage: student, optimiser, average,
passes, time and log, by a hash of everything that they follow from. A later run with the same hash goes on from there,
to the last bit as if it had made the stage itself; its time and its passes count as if it had, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepdistill
from stepdistill.diffusion.philox import NAME
from stepdistill.errors import UserError
from stepdistill.losses.contract import MethodOptions
from stepdistill.losses.regression import WarmStartOptions
from stepdistill.networks.passes import WITH, WITHOUT, Passes
from stepdistill.networks.roles import STUDENT
from stepdistill.system.log import STATS, read_stats, say, wrong_in
from stepdistill.system.parsing import LARGEST
from stepdistill.system.processes import ALONE
from stepdistill.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from stepdistill.training.identity import ResolvedRecipe, identity, resolve
from stepdistill.training.run import Run

_OPTIMIZER = f"optimizer-{STUDENT}"
_ADAMS = ("step", "exp_avg", "exp_avg_sq")


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
            UserError: it is damaged, or no warm start of such a run.
        """
        found, run = checkpoints_in(self.place), self.run
        if not found:
            return
        tensors, state = load_checkpoint(found[-1])
        if wrong := self._wrong_in(tensors, state):
            raise UserError(
                f"{found[-1]} is no warm start of this run ({wrong}): remove it, and it is made again"
            )
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

    def _wrong_in(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> str:
        """What is kept that this run would not have kept; empty where there is nothing. Whoever can write to the folder
        can write hashes that fit."""
        own = self._tensors()
        if odd := sorted(tensors.keys() ^ own.keys()):
            return f"{odd[0]} differs"
        parameters = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        for group, values in tensors.items():
            if group == _OPTIMIZER:
                plain = isinstance(self._optimizer, torch.optim.Adam)  # what others keep is their own
                odd = [name for name, value in values.items() if not _is_of(name, value, parameters, plain)]
                known = {name.partition(".")[0] for name in values} if plain else set()
                odd += [f"{i}.{key}" for i in sorted(known) for key in _ADAMS if f"{i}.{key}" not in values]
            else:
                told = {name: (value.shape, value.dtype) for name, value in values.items()}
                kept = {name: (value.shape, value.dtype) for name, value in own[group].items()}
                odd = sorted(name for name, _ in told.items() ^ kept.items())
            if odd:
                return f"{odd[0]} of {group} differs"
        rows, passes = state.get("rows"), state.get("passes")
        if not isinstance(rows, list) or [wrong_in(row) or row["update"] for row in rows] != [
            *range(self.updates)
        ]:
            return "its log is not one of that stage"
        if type(state.get("seconds")) not in (int, float) or not 0 <= state["seconds"] < LARGEST:
            return "it does not say how long it took"
        if not isinstance(passes, dict) or not all(map(_are_passes, passes.values())):
            return "it does not count its passes"
        name = state.get("made_by")
        return "" if isinstance(name, str) and name.isprintable() else "it does not say whose it is"

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self.run.optimizers[STUDENT]

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """What of the run is kept."""
        own = (_OPTIMIZER, f"masters-{STUDENT}", "ema")
        tensors: dict[str, Mapping[str, Tensor]] = {
            name: part.state() for name, part in self.run.parts.items() if name in own
        }
        tensors[STUDENT] = {k: v for k, v in self.run.roles.state().items() if k.startswith(f"{STUDENT}.")}
        return tensors

    @property
    def due(self) -> bool:
        """Whether the run has just made it, and it is to be kept."""
        return self.run.step == self.updates and not checkpoints_in(self.place)

    def keep(self) -> None:
        """Keeps it."""
        run = self.run
        state = {
            "seconds": run.seconds,
            "passes": run.own_passes.by_network,
            "made_by": run.folder.root.name,
            "rows": read_stats(run.folder.root)[: self.updates],
        }
        save_checkpoint(self.place, self.updates, self._tensors(), state, keep=1)


def _is_of(name: str, value: Tensor, parameters: Sequence[Tensor], plain: bool) -> bool:
    """Whether an optimiser's tensor is one of a parameter's; of Adam, one that it keeps."""
    index, _, key = name.partition(".")
    if not (index.isdecimal() and int(index) < len(parameters)):
        return False
    shape = parameters[int(index)].shape
    right = value.numel() == 1 if key == "step" else value.shape == shape and value.is_floating_point()
    return not plain or (key in _ADAMS and right)


def _are_passes(own: Any) -> bool:
    return (
        isinstance(own, dict)
        and own.keys() == {WITH, WITHOUT}
        and all(type(count) is int and 0 <= count < LARGEST for count in own.values())
    )
