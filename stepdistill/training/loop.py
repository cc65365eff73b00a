"""train(): the one loop. It knows networks that take turns, and no method's name.

A step is one optimiser update of one network. Weights, optimisers, averages and the method's own state are in the
checkpoint; the batch and every random number follow from (seed, step, sample), so a resumed run continues bit for bit.
Gradients are averaged over processes by one all-reduce after the backward passes of a step: networks that take turns,
adapters and stopped gradients need no wrapper, and every process holds the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from stepdistill.attention.kernels import attention
from stepdistill.data.batches import Data
from stepdistill.errors import UserError
from stepdistill.losses.objective import Objective
from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import RunLog
from stepdistill.system.memory import keep_freed_memory
from stepdistill.training.health import Seen, require_finite
from stepdistill.training.interruption import Interruption
from stepdistill.training.parallel import average_gradients, average_numbers, take_turn
from stepdistill.training.run import Finished, Run
from stepdistill.training.schedule import learning_rate


def train(
    objective: Objective,
    data: Data,
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool = False,
    preview: Callable[[int, Ema | None], Seen] | None = None,
) -> Finished:
    """Trains a method's networks, and those of its terms, in their turns.

    Args:
        objective: the method and its terms, their networks on the accelerator's device.
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
    run = Run(objective, recipe, folder, data.identity())
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
            step, turn = run.step, objective.turn(run.step)
            name = turn.network
            parameters, optimizer = run.trained[name], run.optimizers[name]
            take_turn(run.trained, name)

            # Backward, in equal parts whose mean is the batch's loss.
            told: list[dict[str, Tensor]] = []
            for part in data.batch(step, rank * own, own, options.batch).split(options.accumulate):
                with accelerator.autocast():
                    loss, logs = objective.loss(turn, part)
                (loss / options.accumulate).backward()
                told.append({key: value.detach() for key, value in {"loss": loss, **logs}.items()})
            numbers = {key: float(sum(logs[key] for logs in told)) / len(told) for key in told[0]}
            elapsed = time.perf_counter() - started
            if processes > 1:
                average_gradients(parameters)
                numbers = average_numbers({**numbers, "seconds": elapsed}, accelerator.device)
                elapsed = numbers.pop("seconds")  # one time for all, so that a budget stops all at one step

            # Update.
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip or math.inf)
            require_finite({"loss": numbers["loss"], "gradient": float(norm)}, name, step, run.last_good)
            rate = learning_rate(options, step) * objective.lr_ratio(turn)
            if options.lr_of == "x0" and not objective.trained[name].follows:
                rate /= objective.method.student.x0_gain(objective.method.times)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            objective.after_step(turn)
            for other in objective.anew(turn):
                run.optimizers[other].state.clear()
            if run.ema and name == objective.averaged:
                run.ema.update()
            run.step, run.seconds = step + 1, elapsed

            # Say how it goes.
            values: dict[str, float | str] = {
                "turn": name,
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
                plotted = {f"{name}/{k}": v for k, v in values.items() if isinstance(v, float)}
                accelerator.log(plotted, step=step)
            due = run.step % options.checkpoint_every == 0 or run.done
            if main and (due or interruption.asked):
                run.save()
            if interruption.asked:
                log.note(f"stopped after step {step}; --resume goes on from there")
                raise KeyboardInterrupt
    return Finished(run.seconds, run.step, run.ema)
