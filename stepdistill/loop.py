"""train(): the one loop. It knows networks that take turns, and no method's name.

A step is one optimiser update of one network. Weights, optimisers, averages and the method's own state are in the
checkpoint; the batch and every random number follow from (seed, step, sample), so a resumed run continues bit for bit.
Gradients are averaged over processes by one all-reduce after the backward passes of a step: networks that take turns,
adapters and stopped gradients need no wrapper, and every process holds the same weights.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.allocator import keep_freed_memory
from stepdistill.attention import attention
from stepdistill.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    read_state,
    save_checkpoint,
)
from stepdistill.data import Data
from stepdistill.ema import Ema
from stepdistill.errors import UserError
from stepdistill.health import require_finite
from stepdistill.log import RunLog, say
from stepdistill.recipe import Recipe, differences, resolved
from stepdistill.schedule import learning_rate
from stepdistill.sections import TrainOptions
from stepdistill.student import lora_layers
from stepdistill.types import FOLLOWERS, Method


@dataclass(frozen=True)
class Trained:
    """What training leaves besides the weights in the method.

    Attributes:
        seconds: time in the loop, over all resumes.
        step: optimiser steps done.
        ema: the student's averaged weights, or None.
    """

    seconds: float
    step: int
    ema: Ema | None


@dataclass(frozen=True)
class Seen:
    """What a look at the student's pictures gave: numbers to log and worries to say."""

    numbers: dict[str, float]
    worries: list[str]


def take_turn(trained: dict[str, list[nn.Parameter]], turn: str) -> None:
    """Lets gradients reach the parameters of one network alone."""
    for name, parameters in trained.items():
        for parameter in parameters:
            parameter.requires_grad_(name == turn)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces the gradients by their mean over processes, in one all-reduce."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def average_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Means over processes; a NaN of any process is a NaN of all, so that all stop together."""
    flat = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(flat)
    return dict(zip(numbers, (flat / torch.distributed.get_world_size()).tolist(), strict=True))


class Interruption:
    """Within it, Ctrl-C and SIGTERM only ask: the step under way ends, so that what is saved is whole. A second one
    interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Run:
    """The state of a run between two steps, and how it is saved and restored.

    Args:
        method: what is trained.
        recipe: kept in every checkpoint and compared on resume.
        folder: the run folder.
        inputs: ``Data.identity``, kept in every checkpoint and compared on resume; None, where nothing is trained,
            compares nothing.
    """

    def __init__(
        self, method: Method, recipe: Recipe, folder: Path, inputs: dict[str, str] | None = None
    ) -> None:
        self.method, self.recipe, self.options, self.inputs = method, recipe, recipe.train, inputs
        self.checkpoints = folder / "checkpoints"
        options = recipe.train
        networks = method.networks()
        self.trained = {k: [p for p in net.parameters() if p.requires_grad] for k, net in networks.items()}
        self.optimizers = {
            name: torch.optim.AdamW(
                parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
            )
            for name, parameters in self.trained.items()
        }
        averaged = options.ema or options.ema_power
        self.ema = Ema(networks["student"], options.ema, options.ema_power) if averaged else None
        # A frozen parameter of a trained network (the base of an adapter) is the teacher's and need not be kept, nor
        # that of a copy of it (a target network); whatever else a frozen module of the method holds is state.
        student = networks["student"]
        base = {name for name, p in student.named_parameters() if not p.requires_grad}
        copies = [net for net in method.modules() if base and type(net) is type(student) and lora_layers(net)]
        frozen = {id(p) for net in networks.values() for p in net.parameters() if not p.requires_grad}
        frozen |= {id(p) for net in copies for name, p in net.named_parameters() if name in base}
        tensors = [*method.named_parameters(), *method.named_buffers()]
        self.state_names = [name for name, value in tensors if id(value) not in frozen]
        self.step, self.seconds = 0, 0.0
        self.last_good: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are done, or the time for them is spent."""
        budget = self.options.budget_seconds
        return self.step >= self.options.steps or 0 < budget <= self.seconds

    def _method_state(self) -> dict[str, Tensor]:
        state = self.method.state_dict()
        return {name: state[name] for name in self.state_names if name in state}

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors: dict[str, dict[str, Tensor]] = {"method": self._method_state()}
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer-{name}"] = optimizer_state(optimizer)
        if self.ema:
            tensors["ema"] = self.ema.state()
        state = {"recipe": _identity(self.recipe).model_dump(mode="json"), "seconds": self.seconds}
        state |= {"inputs": self.inputs, "folder": str(Path.cwd())}
        self.last_good = save_checkpoint(self.checkpoints, self.step, tensors, state, self.options.keep)

    def restore(self) -> None:
        """Goes back to the last checkpoint.

        Raises:
            UserError: when there is none, it is damaged, or it is of another recipe or of other inputs.
        """
        last = check_resume(self.checkpoints, self.recipe)
        if self.inputs is not None:
            self._check_inputs(last)
        tensors, state = load_checkpoint(last)
        expected = set(self._method_state())
        if set(tensors["method"]) != expected:
            odd = sorted(set(tensors["method"]) ^ expected)[0]
            raise UserError(f"--resume: {last} was made by another version of the method ({odd} differs)")
        self.method.load_state_dict(tensors["method"], strict=False)
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, tensors[f"optimizer-{name}"])
        if self.ema:
            self.ema.load(tensors["ema"])
        self.step, self.seconds, self.last_good = state["step"], state["seconds"], last

    def _check_inputs(self, last: Path) -> None:
        state, inputs = read_state(last), self.inputs or {}
        kept = state.get("inputs")
        if kept is None:
            say(
                f"--resume: {last} is from before checkpoints knew prompts, images and teacher: none was compared"
            )
            return
        named = {"teacher": self.recipe.teacher, "data.prompts": self.recipe.data.prompts}
        named["data.images"] = self.recipe.data.images
        if changed := [name for name in inputs if kept.get(name) != inputs[name]]:
            what = ", ".join(f"{name} ({named[name]})" if named[name] else name for name in changed)
            raise UserError(
                f"--resume: {what} changed since step {state['step']}: put back what it was, or train into another "
                "--output"
            )


def check_resume(checkpoints: Path, recipe: Recipe) -> Path:
    """The last checkpoint, when it was made with this recipe; reads no weights.

    Raises:
        UserError: when there is none, or its recipe differs, naming the keys.
    """
    found = checkpoints_in(checkpoints)
    if not found:
        raise UserError(
            f"--resume: there is no checkpoint in {checkpoints}; leave --resume out to start anew"
        )
    made_with = Recipe.model_validate(read_state(found[-1])["recipe"])
    changed = differences(_identity(made_with), _identity(recipe))
    if changed:
        raise UserError(
            f"--resume: the recipe differs from the one {found[-1]} was made with, in {', '.join(changed)}: "
            "put it back, or train into another --output"
        )
    return found[-1]


def _identity(recipe: Recipe) -> Recipe:
    """The recipe without what cannot move a weight, and so may change between two parts of one run: where its folder
    lies, what is evaluated, how long it may take, what is kept, drawn and tracked."""
    plain = TrainOptions()
    names = ("budget_seconds", "keep", "sheet_every", "tracker")
    train_options = recipe.train.model_copy(update={name: getattr(plain, name) for name in names})
    return resolved(recipe).model_copy(update={"output": None, "evaluate": True, "train": train_options})


def train(
    method: Method,
    data: Data,
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    preview: Callable[[int, Ema | None], Seen] | None = None,
) -> Trained:
    """Trains a method's networks in their turns.

    Args:
        method: the method, its networks on the accelerator's device.
        data: where batches come from.
        recipe: its ``train`` says how; kept in every checkpoint.
        folder: the run folder; gets ``stats.jsonl`` and ``checkpoints/``.
        accelerator: processes, device, precision and trackers.
        resume: go on from the last checkpoint.
        preview: called every ``sheet_every`` steps with the step and the averaged weights; its numbers are logged, its
            worries said above the progress bar.

    Raises:
        TrainingDiverged: at the first loss or gradient that is not finite.
        UserError: when the run cannot be resumed or a checkpoint cannot be written.
    """
    options = recipe.train
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    run = Run(method, recipe, folder, data.identity())
    if resume:
        run.restore()
    processes, rank = accelerator.num_processes, accelerator.process_index
    share, left = divmod(options.batch, processes * options.accumulate)
    if left or not share:
        raise UserError(
            f"train.batch is {options.batch}, which does not split over {processes} processes times "
            f"train.accumulate={options.accumulate}: make it a multiple of {processes * options.accumulate}"
        )
    own = share * options.accumulate
    main = accelerator.is_main_process
    started = time.perf_counter() - run.seconds
    with (
        attention(options.attention, accelerator.device),
        RunLog(folder, options.steps, first=run.step, main=main) as log,
        Interruption() as interruption,
    ):
        while not run.done:
            step, turn = run.step, method.turn(run.step)
            parameters, optimizer = run.trained[turn], run.optimizers[turn]
            take_turn(run.trained, turn)

            # Backward, in equal parts whose mean is the batch's loss.
            told: list[dict[str, Tensor]] = []
            for part in data.batch(step, rank * own, own, options.batch).split(options.accumulate):
                with accelerator.autocast():
                    loss, logs = method.loss(turn, part)
                (loss / options.accumulate).backward()
                told.append({name: value.detach() for name, value in {"loss": loss, **logs}.items()})
            numbers = {name: float(sum(logs[name] for logs in told)) / len(told) for name in told[0]}
            elapsed = time.perf_counter() - started
            if processes > 1:
                average_gradients(parameters)
                numbers = average_numbers({**numbers, "seconds": elapsed}, accelerator.device)
                elapsed = numbers.pop("seconds")  # one time for all, so that a budget stops all at one step

            # Update.
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
            require_finite({"loss": numbers["loss"], "gradient": float(norm)}, turn, step, run.last_good)
            rate = learning_rate(options, step) * method.lr_ratio(turn, step)
            if options.lr_of == "x0" and turn not in FOLLOWERS:
                rate /= method.student.x0_gain(method.times)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(step)
            for name in method.anew(step):
                run.optimizers[name].state.clear()
            if run.ema and turn == "student":
                run.ema.update()
            run.step, run.seconds = step + 1, elapsed

            # Say how it goes.
            values: dict[str, float | str] = {
                "turn": turn,
                **numbers,
                "grad_norm": float(norm),
                "lr": rate,
            }
            if main and preview and options.sheet_every and run.step % options.sheet_every == 0:
                seen = preview(run.step, run.ema)
                values.update(seen.numbers)
                for worry in seen.worries:
                    log.note(f"step {run.step}: {worry}")
            values["seconds"] = run.seconds
            log.step(step, values, shown=("turn", "loss"))
            if options.tracker:
                plotted = {f"{turn}/{k}": v for k, v in values.items() if isinstance(v, float)}
                accelerator.log(plotted, step=step)
            due = run.step % options.checkpoint_every == 0 or run.done
            if main and (due or interruption.asked):
                run.save()
            if interruption.asked:
                log.note(f"stopped after step {step}; --resume goes on from there")
                raise KeyboardInterrupt
    return Trained(run.seconds, run.step, run.ema)
