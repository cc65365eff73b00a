"""train(): the one loop. It knows networks that take turns, and no method's name.

A step of the loop is one update of one network. Weights, optimisers, averages and the method's own state are in the
checkpoint; the batch and every random number follow from (seed, step, sample), so a resumed run continues bit for bit.
Nothing waits for the device but the read of what the steps told, every ``train.log_every`` of them, and a look at how
the run is, every ``health.every`` (monitor.py). Each paragraph says which processes take part: what is done by all of
them is done in the same order, as some of it waits for the others (see ``Parallel``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path

from accelerate import Accelerator

from stepdistill.attention.kernels import attention
from stepdistill.data.batches import Data
from stepdistill.errors import Unhealthy, UserError
from stepdistill.losses.objective import Objective, shown_name
from stepdistill.networks.averages import Ema
from stepdistill.networks.compiled import compiled, uncompiled
from stepdistill.networks.passes import Passes
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.log import RunLog, Value
from stepdistill.system.memory import keep_freed_memory, peak_memory
from stepdistill.system.processes import ALONE
from stepdistill.system.run_folder import RunStatus
from stepdistill.training.arithmetic import autocast
from stepdistill.training.feed import Feed
from stepdistill.training.further_teachers import identity_of
from stepdistill.training.health import Seen, not_finite, require_finite, verdict_of
from stepdistill.training.interruption import Interruption
from stepdistill.training.monitor import Monitor
from stepdistill.training.out_of_memory import memory_explained
from stepdistill.training.own_files import own_hashes
from stepdistill.training.parallel import OneProcess, Parallel
from stepdistill.training.run import Finished, Run
from stepdistill.training.run_report import Start
from stepdistill.training.schedule import learning_rate
from stepdistill.training.signs import Trouble
from stepdistill.training.student_start import identity_of_start
from stepdistill.training.unread import Unread
from stepdistill.training.update import update
from stepdistill.training.warm_starts import WarmStart


def train(
    objective: Objective,
    data: Data,
    recipe: Recipe,
    folder: Path,
    accelerator: Accelerator,
    *,
    parallel: Parallel | None = None,
    resume: bool = False,
    preview: Callable[[int, Ema | None], Seen] | None = None,
    status: RunStatus | None = None,
    start: Start | None = None,
    before: Passes | None = None,
    track: Callable[[int, Mapping[str, Value]], None] | None = None,
) -> Finished:
    """Trains a method's networks, and those of its terms, in their turns.

    Args:
        objective: the method and its terms, their networks on the accelerator's device.
        data: where batches come from.
        recipe: its ``train`` says how; kept in every checkpoint.
        folder: the run folder; gets ``stats.jsonl`` and ``work/checkpoints/``.
        accelerator: device and precision.
        parallel: how several processes share it; None is one alone.
        resume: go on from the last checkpoint.
        preview: called every ``preview_every`` updates with their number and the averaged weights; its numbers are
            logged, its worries said above the progress bar.
        status: told how far the run is.
        start: what started it, kept in every checkpoint.
        before: network passes that were made before; of a resumed run the checkpoint tells them.
        track: called with every update, from 0, and its row of stats.jsonl.

    Raises:
        TrainingDiverged: for the first loss or gradient that is not finite, at the latest ``train.log_every`` updates
            after it and before any checkpoint.
        Unhealthy: where the run is to stop at a sign of trouble.
        UserError: when the run cannot be resumed, a checkpoint cannot be written, or a GPU's memory ends.
    """
    options = recipe.train
    parallel = parallel or OneProcess(ALONE, accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    # Of the teachers as they are before they are shared out.
    roles = objective.method.roles
    inputs = data.identity() | identity_of(roles.route) | own_hashes(recipe)
    inputs |= identity_of_start(recipe, roles.student)
    if parallel.in_parts:
        roles.hold_alone()
    parallel.spread(roles.stored().values())
    run = Run(objective, recipe, folder, inputs, parallel, start, before)
    readers = parallel.readers
    share, left = divmod(options.batch, readers.count * options.accumulate)
    monitor = Monitor(run, data, recipe.health, parallel, share)
    run.watch(monitor)
    warm_start = WarmStart.of(run)
    if resume:
        run.restore()
    elif warm_start:
        warm_start.take_over()
    if run.step and status:
        status.trained(run.step, run.seconds)
    if left or not share:
        raise UserError(
            f"train.batch is {options.batch}, which does not split over {readers.count} processes times "
            f"train.accumulate={options.accumulate}: make it a multiple of {readers.count * options.accumulate}"
        )
    if share % options.group:
        raise UserError(
            f"train.batch is {options.batch}, of which a process takes {share} at a time, and train.group is "
            f"{options.group}: make the batch a multiple of {readers.count * options.accumulate * options.group}"
        )
    own = share * options.accumulate
    started = time.perf_counter() - run.seconds
    unread = Unread(parallel, lambda: time.perf_counter() - started, options.log_every)
    feed = Feed(data, options.updates, readers.rank * own, own, options.batch)
    method = objective.method
    with (
        memory_explained(recipe, folder, accelerator.device),
        closing(feed),
        attention(options.attention, accelerator.device, options.precision),
        method.roles.checkpointed() if options.checkpointing else nullcontext(),
        compiled(method.roles.stored().values(), options.compile, same_sizes=method.same_calls) as begin,
        RunLog(folder, options.updates, first=run.step, main=parallel.main) as log,
        Interruption() as interruption,
    ):
        while not run.done:
            # Whose turn (every process).
            step, turn = run.step, objective.turn(run.step)
            name = turn.network
            begin()

            # Its update (every process, its own samples).
            rate = learning_rate(options, step) * objective.lr_ratio(turn) * monitor.rate(name)
            if options.lr_of == "x0" and not objective.trained[name].follows:
                rate /= objective.method.student.x0_gain(objective.method.times)
            monitor.before(step)
            batch = feed.at(step)
            told, norm = update(run, turn, batch, rate)
            monitor.movement.moved(name)
            run.step = step + 1
            seconds = unread.add(step, name, told, norm, rate)
            # Several processes agree on a time where they read, so that a budget stops all at one step.
            if parallel.count == 1:
                run.seconds = seconds

            # Once in a while, and before whatever must not be made of a step that went wrong: what the steps told
            # (every process, at one step, so that all stop together).
            previewed = bool(options.preview_every) and run.step % options.preview_every == 0
            due = run.step % options.checkpoint_every == 0
            looked = monitor.due(run.step)
            asked = interruption.asked and parallel.count == 1
            shared = warm_start is not None and warm_start.due
            told_now = previewed or due or looked or asked or shared or run.done
            if not (told_now or run.step % unread.every == 0):
                continue
            rows, asked = unread.read(interruption.asked)
            run.seconds = rows[-1].seconds
            troubles, treatment = list[Trouble](), None
            for row in rows:
                said, phase = shown_name(row.network), objective.phase(row.step)
                if wrong := not_finite(row.numbers):
                    treatment = monitor.not_finite(wrong, row)
                    if treatment is None:
                        require_finite(row.numbers, said, row.step, run.last_good)
                    break
                named = {"phase": phase} if phase else {}
                values: dict[str, Value] = {"network": said, **named, **row.numbers, "lr": row.rate}
                health, worries = None, monitor.told()
                troubles += monitor.read(row, phase)

                # A look (every process).
                if looked and row is rows[-1]:
                    with uncompiled(), autocast(options.precision, parallel.device):
                        numbers, found = monitor.look(run.step, batch)
                    parallel.let_go()
                    values |= numbers
                    troubles += found
                    health = verdict_of(monitor.open.values())

                # Pictures (drawn by every process that was given a preview, kept by the main one).
                if preview and previewed and row is rows[-1]:
                    with uncompiled():
                        seen = preview(run.step, run.ema)
                    parallel.let_go()
                    values |= seen.numbers
                    worries += seen.worries
                    health = verdict_of([*seen.worries, *monitor.open.values()])
                    for worry in seen.worries:
                        log.note(f"update {run.step}: {worry}")

                # What is done about what was found (every process).
                if troubles and row is rows[-1]:
                    health = verdict_of([trouble.sentence for trouble in troubles])
                    treatment = monitor.treat(troubles, run.step)
                    worries += treatment.sentences
                if worries:
                    values["worries"] = worries

                # How it goes (the main process).
                values["seconds"] = row.seconds
                if row is rows[-1]:
                    values["memory_bytes"] = float(peak_memory(accelerator.device))
                log.update(row.step, values, shown=("network", "loss"))
                if status:
                    status.trained(row.step + 1, row.seconds, health)
                if track:
                    track(row.step, values)
            if treatment is not None:
                for sentence in treatment.sentences:
                    log.note(f"update {step + 1}: {sentence}")
                if treatment.action == "stop":
                    raise Unhealthy(treatment.last_words)
                if treatment.action == "roll_back":
                    log.back_to(run.step)
                    if status:
                        status.trained(run.step, run.seconds)
                    continue

            if warm_start and shared and not monitor.measures:
                warm_start.keep()

            # A checkpoint, now and then and where one was asked to stop (every process: it may hold a part).
            if due or asked or run.done:
                run.save()
            if asked:
                log.note(f"stopped after update {step}; --resume goes on from there")
                raise interruption.ended()
    run.widen()
    ends = (run.passes(), run.warm_start_of, tuple(monitor.open.values()))
    return Finished(run.seconds, run.step, run.ema, run.starts, data.skipped, *ends)
