"""One update of one network: what the loop does between a batch and the next weights, on tensors of any kind."""

from __future__ import annotations

from torch import Tensor

from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Turn
from stepdistill.training.arithmetic import autocast
from stepdistill.training.parallel import take_turn
from stepdistill.training.run import Run


def update(run: Run, turn: Turn, batch: Batch, rate: float) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Updates the network whose turn it is. Every process calls it with its own samples.

    Args:
        run: the networks, optimisers and averages.
        turn: whose it is.
        batch: is worked through in ``train.accumulate`` equal parts, whose mean is the batch's loss.
        rate: the learning rate.

    Returns:
        What each part told, its loss among it, and the norm of the gradients.
    """
    objective, options, parallel, name = run.objective, run.options, run.parallel, turn.network
    parameters, optimizer = run.trained[name], run.optimizers[name]
    take_turn(run.trained, name)
    told: list[dict[str, Tensor]] = []
    parts = batch.split(options.accumulate)
    for part in parts:
        with run.roles.counter.counting(run.own_passes), autocast(options.precision, parallel.device):
            loss, logs = objective.loss(turn, part)
        if part is parts[-1]:
            parallel.expect(parameters)
        (loss / options.accumulate if options.accumulate > 1 else loss).backward()
        told.append({key: value.detach() for key, value in {"loss": loss, **logs}.items()})
    parallel.average(parameters)
    norm = parallel.norm(parameters, options.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if "betas" in group:
            group["betas"] = objective.betas(turn) or options.betas
    run.weights[name].step(run.step)
    objective.after_step(turn)
    for other in objective.anew(turn):
        run.weights[other].forget()
    if run.ema and name == objective.averaged:
        run.ema.update()
    return told, norm
