"""How much a DMD unit costs beside its bare network passes, in one process: python eval/bench/step.py

A unit is one student update and k updates of the fake network, as the loop does them: batch, draws, losses, backward,
clipping, optimiser, averages, log. Bare are the forward and backward passes it cannot do without, on ready tensors:
student forward and backward, teacher forward of 2 B (guidance), fake forward; and k times student forward, fake forward
and backward. Both are timed in turn; the ratio is of medians. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from stepdistill.methods.dmd import DMD
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.provenance import provenance
from stepdistill.training.arithmetic import autocast
from stepdistill.training.assemble import Assembled, assemble, training_data
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.parallel import take_turn

WARM, TIMED = 2, 3
"""Units of a short run that are left out, as the first ones make the optimisers' state, and units that are timed."""


def unit_seconds(job: Assembled, accelerator: Accelerator, folder: Path, fake_steps: int) -> float:
    """Seconds of a unit of a short run, once the run is under way: the mean of its last ones."""
    data = training_data(job, folder)
    train(job.objective, data, job.recipe, folder, accelerator)
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    unit = fake_steps + 1
    return float(rows[-1]["seconds"] - rows[WARM * unit - 1]["seconds"]) / TIMED


def trained_parameters(job: Assembled) -> dict[str, list[torch.nn.Parameter]]:
    """What each network trains."""
    return {name: job.objective.weights(name) for name in job.objective.trained}


def bare_seconds(
    job: Assembled, trained: dict[str, list[torch.nn.Parameter]], batch: int, fake_steps: int
) -> float:
    """Seconds of the network passes of one unit."""
    method, teacher, device = job.method, job.teacher, job.accelerator.device
    assert isinstance(method, DMD)
    x, t = torch.randn(batch, *teacher.codec.shape, device=device), torch.rand(batch, device=device)
    cond = teacher.codec.encode(job.prompts[:batch])
    both, both_t, both_cond = torch.cat([x, x]), torch.cat([t, t]), cond.join(cond)

    def learn(name: str, call: Callable[[], torch.Tensor]) -> None:
        take_turn(trained, name)
        with autocast(job.recipe.train.precision, job.accelerator.device):
            value = call().square().mean()
        torch.autograd.grad(value, trained[name])

    synchronize(device)
    began = time.perf_counter()
    learn("student", lambda: method.student.raw(x, t, cond))
    with torch.no_grad(), autocast(job.recipe.train.precision, job.accelerator.device):
        teacher.denoiser.raw(both, both_t, both_cond)
        method.fake.raw(x, t, cond)
    for _ in range(fake_steps):
        with torch.no_grad(), autocast(job.recipe.train.precision, job.accelerator.device):
            method.student.raw(x, t, cond)
        learn("fake", lambda: method.fake.raw(x, t, cond))
    synchronize(device)
    seconds = time.perf_counter() - began
    for parameters in trained.values():  # as a run finds them
        for parameter in parameters:
            parameter.requires_grad_(True)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--fake-steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    recipe = load_recipe(
        method="dmd",
        teacher="emoji",
        sets=[
            *("options.warm_start=0", "options.fake_warm_start=0", "train.sheet_every=0", "train.ema=0.99"),
            f"options.fake_steps={chosen.fake_steps}",
            f"train.steps={(WARM + TIMED) * (chosen.fake_steps + 1)}",
            f"train.batch={chosen.batch}",
        ],
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    job = assemble(resolve(recipe), accelerator, None)
    trained = trained_parameters(job)
    units, bares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(chosen.repeats + 1):
            unit = unit_seconds(job, accelerator, Path(folder), chosen.fake_steps)
            bare = statistics.mean(
                bare_seconds(job, trained, chosen.batch, chosen.fake_steps) for _ in range(TIMED)
            )
            if repeat:  # the first round warms up
                units.append(unit)
                bares.append(bare)
    unit, bare = statistics.median(units), statistics.median(bares)
    print(f"unit of 1 + {chosen.fake_steps} updates, batch {chosen.batch}: {unit * 1000:.0f} ms")
    print(f"its bare network passes: {bare * 1000:.0f} ms")
    print(f"ratio: {unit / bare:.3f} (median of {chosen.repeats}; {provenance()['hardware']})")


if __name__ == "__main__":
    main()
