"""Puts faults into a run and prints what the run's watch makes of them: python tests/injections.py --output FOLDER

A one-step student of the emoji teacher is trained by dmd until it draws (a warm start on pairs, then matching). From
its checkpoint, of an update after which there was a look, go as many runs as there are faults (tests/toys/faults.py);
in each of them one thing goes wrong from the next update on, which is the latest moment before a look. Student updates
are counted from there to the update after which the fault was recognised. One more run goes on without a fault.

    python tests/injections.py --output runs/injections --only "wrong sign" --numbers
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "toys")]

from faults import FAULTS, run_with  # noqa: E402

from stepdistill.errors import Unhealthy  # noqa: E402
from stepdistill.losses.fake_score import turn_at  # noqa: E402
from stepdistill.methods import method_options  # noqa: E402
from stepdistill.recipes.recipe import Recipe, load_recipe  # noqa: E402

SETS = [
    "teacher=emoji", "method=dmd", "evaluate=false", "student.times=[1.0]", "student.output=teacher",
    "options.guidance=2.5", "options.score_guidance=1.25", "options.pair_distance=l1", "options.pair_solver=ddim",
    "options.warm_start_lr_ratio=100", "options.fake_updates=1", "options.fake_lr_ratio=50",
    "options.fake_loss=output", "options.pair_weight=0.25", "train.lr=1.0e-5", "train.warmup=20",
    "train.betas=[0.9, 0.99]", "train.weight_decay=0.0", "train.clip=10.0", "train.average=0.97",
    "train.preview_every=0", "train.checkpoint_every=40",
]  # fmt: skip
ACTIONS = "health.actions={rate: roll_back, not_finite: roll_back, lag: slow_down}"


def recipe_of(updates: int, arguments: argparse.Namespace, pairs: Path, *more: str) -> Recipe:
    """The run's: so many updates, of which the warm start is the first part."""
    warm, fake = arguments.warm, arguments.fake
    sets = [
        *SETS, f"train.updates={updates}", f"train.batch={arguments.batch}", f"data.pairs={pairs}",
        f"options.pairs={arguments.pairs}", f"options.pair_steps={arguments.pair_steps}",
        f"options.warm_start={warm}", f"options.fake_warm_start={fake}", *more,
    ]  # fmt: skip
    return load_recipe(Path(__file__).parent / "toys" / "empty.yaml", sets=sets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=304, help="updates of the warm start")
    parser.add_argument("--fake", type=int, default=32, help="updates of the follower alone")
    parser.add_argument("--base", type=int, default=400, help="updates before the onset, a multiple of 40")
    parser.add_argument("--after", type=int, default=112, help="updates after it, at most")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--pair-steps", type=int, default=6)
    parser.add_argument("--pairs-in", type=Path, help="pairs that are there already")
    parser.add_argument("--only", action="append", help="a fault, or none")
    parser.add_argument("--numbers", action="store_true", help="print the numbers of every look")
    arguments = parser.parse_args()
    output: Path = arguments.output
    pairs = arguments.pairs_in or output / "pairs"
    total = arguments.base + arguments.after

    # One recipe, of which a base run makes the first part: what is watched may differ between parts of a run.
    base = output / "base"
    options = method_options(recipe_of(total, arguments, pairs))

    def student_updates(first: int, last: int) -> int:
        return sum(turn_at(step, options, options.warm_start) == "student" for step in range(first, last))

    if not (base / "work" / "checkpoints" / f"step-{arguments.base:08d}").is_dir():
        shutil.rmtree(base, ignore_errors=True)
        outcome = run_with(recipe_of(total, arguments, pairs), base, stop, arguments.base)
        _numbers("base", outcome.looks, arguments.numbers)
        print(f"base: {len(outcome.treatments)} alarms in {arguments.base} updates", flush=True)
    head = ["fault", "onset", "recognised", "student updates", "by", "action", "ended"]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|", flush=True)
    for name in arguments.only or ["none", *FAULTS]:
        folder = output / name.replace(" ", "-").replace(",", "")
        shutil.rmtree(folder, ignore_errors=True)
        watched = recipe_of(total, arguments, pairs, "health.on_trouble=stop", "health.most=1", ACTIONS)
        outcome = run_with(watched, folder, FAULTS.get(name), arguments.base, resume=base)
        at = outcome.recognised
        took = "" if at is None else str(student_updates(arguments.base, at))
        done = [treatment.action for _, _, treatment in outcome.treatments]
        cells = [
            name, str(arguments.base + 1), str(at or "not"), took, ", ".join(outcome.signs), ", ".join(done),
            "stopped" if outcome.ended else "all updates done",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
        _numbers(name, outcome.looks, arguments.numbers)
        shutil.rmtree(folder / "work", ignore_errors=True)


def stop(under: object) -> None:
    """No fault: the end of the base run."""
    raise Unhealthy("enough")


def _numbers(name: str, looks: dict[int, dict[str, float]], shown: bool) -> None:
    for update, numbers in looks.items() if shown else ():
        said = {key.removeprefix("health_"): float(f"{value:.3g}") for key, value in numbers.items()}
        print(f"  {name} {update} {json.dumps(said)}", flush=True)


if __name__ == "__main__":
    main()
