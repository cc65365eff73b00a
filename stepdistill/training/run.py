"""The state of a run between two updates, and how it is saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from pydantic import ValidationError

from stepdistill.diffusion.philox import NAME
from stepdistill.errors import UserError
from stepdistill.losses.objective import Objective
from stepdistill.networks.averages import Ema
from stepdistill.networks.passes import WITH, WITHOUT, Passes
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.files import remove_folder
from stepdistill.system.processes import ALONE
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.checkpoint import (
    check_files,
    checkpoints_in,
    folder_of,
    groups_of,
    load_group,
    read_state,
    save_checkpoint,
)
from stepdistill.training.identity import differences, identity
from stepdistill.training.own_files import as_begun
from stepdistill.training.parallel import OneProcess, Parallel
from stepdistill.training.parts import ModulePart, OptimizerPart, Part, held_like_part
from stepdistill.training.run_report import Start
from stepdistill.training.weights import in_training

WATCHER = "health"
"""The part of a checkpoint that a run can do without."""


@dataclass(frozen=True)
class Finished:
    """What training leaves besides the weights in the method.

    Attributes:
        seconds: time in the loop, over all resumes.
        step: updates done.
        ema: the student's averaged weights, or None.
        starts: of the run, the first and every resume.
        skipped: images that could not be read.
        passes: network passes, over all resumes and processes.
        warm_start_of: the run that made its warm start; None where it made what it has itself.
        worries: what was found wrong and lasts, a sentence each.
    """

    seconds: float
    step: int
    ema: Ema | None
    starts: tuple[Start, ...] = ()
    skipped: int = 0
    passes: Passes = field(default_factory=Passes)
    warm_start_of: str | None = None
    worries: tuple[str, ...] = ()


class Run:
    """The state of a run between two updates, and how it is saved and restored.

    Args:
        objective: what is trained.
        recipe: kept in every checkpoint and compared on resume.
        folder: the run folder.
        inputs: ``Data.identity``, kept in every checkpoint and compared on resume; None, where nothing is trained,
            compares nothing.
        parallel: who shares the run; None is nobody.
        start: of this process, kept in every checkpoint behind those of the processes before it; None is told nowhere.
        before: network passes before the first update.

    Attributes:
        parts: all that is saved, by name.
        starts: so far.
        own_passes: network passes of this process since its start.
        warm_start_of: the run that made its warm start, see ``warm_starts.py``; None where it made what it has itself.
    """

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        folder: Path,
        inputs: dict[str, str] | None = None,
        parallel: Parallel | None = None,
        start: Start | None = None,
        before: Passes | None = None,
    ) -> None:
        self.before: Passes | None = before or Passes()
        self.own_passes = Passes()
        self.warm_start_of: str | None = None
        self._start = () if start is None else (start,)
        self.starts: tuple[Start, ...] = self._start
        self.parallel = parallel or OneProcess(ALONE, torch.device("cpu"))
        self.objective, self.recipe, self.options, self.inputs = objective, recipe, recipe.train, inputs
        self.folder = RunFolder(folder)
        self.checkpoints = self.folder.checkpoints
        options = recipe.train
        self.trained = {name: objective.weights(name) for name in objective.trained}
        self.weights = in_training(objective, options)
        self.optimizers = {name: each.optimizer for name, each in self.weights.items()}
        self.roles = objective.method.roles
        averaged = options.average or options.average_power
        weights = self.roles.weights(objective.trained[objective.averaged].role or "")
        exact = {name: self.weights[objective.averaged].exact(value) for name, value in weights.items()}
        place = torch.device("cpu") if options.average_device == "cpu" else None
        self.ema = Ema(weights, options.average, options.average_power, exact, place) if averaged else None
        # The teacher's own weights are no part of it.
        self.parts: dict[str, Part] = {"roles": self.roles}
        for part, module in (("method", objective.method), ("terms", objective.terms)):
            if module.state_dict():
                self.parts[part] = ModulePart(module)
        self.parts |= {f"optimizer-{name}": OptimizerPart(each) for name, each in self.optimizers.items()}
        masters = {f"masters-{name}": each for name, each in self.weights.items() if each.state()}
        self.parts |= masters
        if self.ema:
            self.parts["ema"] = self.ema
        self.step, self.seconds = 0, 0.0
        self.last_good: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all updates are done, or the time for them is spent."""
        budget = self.options.budget_seconds
        return self.step >= self.options.updates or 0 < budget <= self.seconds

    def passes(self) -> Passes:
        """Network passes of all processes, over all resumes; none where they were not counted from the start.
        Every process calls it. Processes that share each sample's tokens make a pass together."""
        own = Passes()
        for each in self.parallel.processes.gather(self.own_passes.by_network):
            own.add(Passes(each))
        if self.before is None:
            return Passes()
        found = Passes(self.before.by_network)
        together = self.parallel.count // self.parallel.readers.count
        for who, made in own.by_network.items():
            found.count(who, made[WITH] // together, graph=True)
            found.count(who, made[WITHOUT] // together, graph=False)
        return found

    def watch(self, watcher: Part) -> None:
        """Keeps what watches the run in its checkpoints. Those without it can be gone on from, too."""
        self.parts[WATCHER] = watcher

    def healthy(self, until: int) -> Path | None:
        """The last checkpoint of at most so many updates, as the main process sees them; None where there is none."""
        found = [each for each in checkpoints_in(self.checkpoints) if each.name <= folder_of(until)]
        return self.parallel.processes.gather(found[-1] if found else None)[0]

    def save(self, only: bool = False) -> None:
        """Writes a checkpoint: the main process all of it, or every process what it holds.

        Args:
            only: whether later ones go: the run went back.
        """
        if only and self.parallel.main:
            for later in checkpoints_in(self.checkpoints):
                if later.name > folder_of(self.step):
                    remove_folder(later)
        shared, passes = self.parallel.in_parts, self.passes()
        self.last_good = self.checkpoints / folder_of(self.step)
        if not (shared or self.parallel.main):
            return
        tensors = {name: part.state() for name, part in self.parts.items()}
        state = {"recipe": identity(self.recipe).model_dump(mode="json"), "seconds": self.seconds}
        state |= {"inputs": self.inputs, "folder": str(Path.cwd()), "draws": NAME}
        state |= {"starts": [each.model_dump() for each in self.starts], "passes": passes.by_network or None}
        state |= {"warm_start_of": self.warm_start_of}
        sharers = self.parallel.processes if shared else ALONE
        save_checkpoint(self.checkpoints, self.step, tensors, state, self.options.keep, sharers)

    def widen(self) -> None:
        """Ends training: whatever ``train.weights`` is, the networks are float32 from here on, and exact."""
        for name, each in self.weights.items():
            each.widen()
            if (role := self.objective.trained[name].role) is not None and self.options.weights != "float32":
                self.roles[role].compute = None

    def restore(self, at: Path | None = None) -> None:
        """Goes back to a checkpoint, in every process; time that was spent stays spent.

        Args:
            at: which; None is the last.

        Raises:
            UserError: when there is none, it is damaged, or it is of another recipe, of other inputs or of other random
                numbers.
        """
        at = check_resume(self.folder, self.recipe, at, trained_on=self.inputs is not None)
        if self.inputs is not None:
            self._check_inputs(at)
        state, processes = read_state(at), self.parallel.processes
        processes.together(lambda: check_files(at, state, processes))
        files = groups_of(state)
        watched = WATCHER in files and WATCHER in self.parts
        if odd := sorted((files.keys() ^ self.parts.keys()) - {WATCHER}):
            raise UserError(f"--resume: {at} was made by another version of the run ({odd[0]} differs)")
        for name, part in self.parts.items():
            if name == WATCHER and not watched:
                continue
            tensors = load_group(at, files[name], held_like_part(part) if self.parallel.in_parts else None)
            if name in ("roles", "method", "terms") and (odd := sorted(tensors.keys() ^ part.state().keys())):
                raise UserError(
                    f"--resume: {at} was made by another version of the {name} ({odd[0]} differs)"
                )
            part.load(tensors)
        self.step, self.seconds = state["step"], max(self.seconds, state["seconds"])
        self.before = Passes(kept) if (kept := state.get("passes")) else None
        self.own_passes, self.warm_start_of = Passes(), state.get("warm_start_of")
        self.last_good = at
        resumed = (each.model_copy(update={"update": self.step}) for each in self._start)
        self.starts = (*(Start.model_validate(each) for each in state["starts"]), *resumed)

    def _check_inputs(self, last: Path) -> None:
        state, inputs = read_state(last), self.inputs or {}
        kept = state["inputs"]
        named = {"teacher": self.recipe.teacher, "data.prompts": self.recipe.data.prompts}
        named |= {"data.images": self.recipe.data.images, "method": self.recipe.method}
        named |= {"data.rich": self.recipe.data.rich, "student.start": self.recipe.student.start}
        named |= {"family": self.recipe.family, "data.route": ", ".join(self.recipe.data.route.values())}
        named |= {f"teachers.{name}": place for name, place in self.recipe.teachers.items()}
        if changed := [name for name in inputs if kept.get(name) != inputs[name]]:
            what = ", ".join(f"{name} ({named[name]})" if named[name] else name for name in changed)
            raise UserError(
                f"--resume: {what} changed since step {state['step']}: put back what it was, or train into another "
                "--output"
            )


def check_resume(
    folder: RunFolder, recipe: Recipe, at: Path | None = None, *, trained_on: bool = True
) -> Path:
    """The checkpoint ``at``, by default the last one, when it was made with this recipe; reads no weights.

    Args:
        folder: of the run.
        recipe: of the run.
        at: which; None is the last.
        trained_on: whether the run goes on from it, and so needs the random numbers that it was made with.

    Raises:
        UserError: when there is none, its random numbers are others, or its recipe differs, naming the keys.
    """
    found = [at] if at else checkpoints_in(folder.checkpoints)
    if not found:
        raise UserError(
            f"--resume: there is no checkpoint in {folder.checkpoints}; leave --resume out to start anew"
        )
    state = read_state(found[-1])
    if trained_on and state.get("draws") != NAME:
        raise UserError(
            f"--resume: {found[-1]} was made with other random numbers ({state.get('draws', 'of an older version')}) "
            f"than {NAME}, so it would not go on bit for bit: finish it with the version that began it, or train into "
            "another --output"
        )
    try:
        made_with = Recipe.model_validate(state["recipe"])
    except ValidationError:
        raise UserError(
            f"--resume: the recipe in {found[-1]} is that of an earlier version, whose keys have other names: finish "
            "it with the version that began it, or train into another --output"
        ) from None
    begun, wanted = (as_begun(each, folder.root) for each in (made_with, recipe))
    changed = differences(identity(begun), identity(wanted))
    if changed:
        raise UserError(
            f"--resume: the recipe differs from the one {found[-1]} was made with, in {', '.join(changed)}: "
            "put it back, or train into another --output"
        )
    return found[-1]
