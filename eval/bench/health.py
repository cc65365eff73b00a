"""What watching a run costs, in one run: python eval/bench/health.py

A short run of each method on the emoji teacher, or another one, with the looks of its recipe's defaults. Of the run's
own time the part is taken that the watch spends in it: in looks after the first, in the weights taken before them, and
in reading what updates tell. The first look also draws the teacher's samples, once for a whole run, and stands apart.
The ratio is of times in the same run: on a CPU of processor time, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from stepdistill.recipes.recipe import Recipe
from stepdistill.system.provenance import provenance
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.monitor import Monitor
from stepdistill.training.run import Run
from stepdistill.training.training_data import training_data

METHODS = {
    "dmd": {"fake_updates": 5, "guidance": 2.5},
    "lcm": {"pairs": 64, "pair_steps": 2, "guidance": 2.5},
}


def clock() -> float:
    """Seconds, with all that a GPU was told done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(method: str, teacher: str, batch: int, every: int, updates: int) -> dict[str, float]:
    """Seconds of a run and of its watch."""
    spent: dict[str, list[float]] = {"look": [], "before": [], "read": []}

    def timed(name: str) -> Callable[..., Any]:
        plain = getattr(Monitor, name)

        def call(self: Monitor, *arguments: Any) -> Any:
            began = clock()
            found = plain(self, *arguments)
            spent[name].append(clock() - began)
            return found

        return call

    said: dict[str, Any] = {"method": method, "teacher": teacher, "options": METHODS[method]}
    said["student"] = {"output": "teacher"}
    said["health"] = {"every": every}
    said["train"] = {"batch": batch, "updates": updates, "preview_every": 0, "average": 0.99}
    recipe = Recipe.model_validate(said)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as name:
        job = assemble(resolve(recipe), accelerator)
        data = training_data(job, Path(name))
        with (
            patch.object(Run, "save", lambda *_: None),
            patch.object(Monitor, "look", timed("look")),
            patch.object(Monitor, "before", timed("before")),
            patch.object(Monitor, "read", timed("read")),
        ):
            began = clock()
            train(job.objective, data, recipe, Path(name), accelerator)
            whole = clock() - began
    first, *looks = spent["look"]
    watch = sum(looks) * updates / (updates - every) + sum(spent["before"]) + sum(spent["read"])
    updating = whole - first - sum(looks) - sum(spent["before"]) - sum(spent["read"])
    return {
        "update_ms": 1000 * updating / updates,
        "look_ms": 1000 * sum(looks) / len(looks),
        "first_look_ms": 1000 * first,
        "of_an_update_percent": 100 * watch / updating,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--updates", type=int, default=160)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    origin = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps({"hardware": origin["hardware"], "commit": origin["commit"]}))
    for method in arguments.methods:
        found = measure(method, arguments.teacher, arguments.batch, arguments.every, arguments.updates)
        print(method, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
