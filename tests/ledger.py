"""The losses of every method's first three updates, to the last bit: whether a change of the code's shape changed what
it computes.

    python tests/ledger.py record        # write them down, before
    python tests/ledger.py check         # compare, after

Every method between the perceptrons of stepdistill/testing, then two updates of each network by DMD on every tiny
pipeline of tests/toys/tiny.py, through recipe, loop, export and proof. Bits differ between processors and versions of
torch, so both are to be run on one machine, and the suite does not run this.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import stepdistill
from stepdistill.system.shipped import method_names
from stepdistill.training.parallel import take_turn

sys.path.insert(0, str(Path(__file__).parent / "toys"))
from tiny import PIPELINES, SIZES, tiny_pipeline, tiny_prompts

from stepdistill.testing.contract import batch_for, build
from stepdistill.testing.toys import clear

LEDGER = Path(__file__).with_name("ledger.json")
UPDATES = 3


def of_method(name: str) -> list[str]:
    """Losses of the first updates, by plain gradient steps of the networks whose turn it is."""
    method = build(name)
    networks = {key: one.parameters(method.roles) for key, one in method.trained().items()}
    losses = []
    for step in range(2 * UPDATES):
        turn = method.turn(step)
        take_turn(networks, turn.network)
        clear(method)
        loss = method.loss(turn, batch_for(method, step=step)).value
        loss.backward()
        with torch.no_grad():
            for parameter in networks[turn.network]:
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        method.after_step(turn)
        losses.append(float(loss.detach()).hex())
    return losses


def of_pipeline(name: str) -> list[str]:
    """Losses of a short run of DMD on a tiny pipeline, as its stats.jsonl has them."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(tiny_prompts(name, 4)))
        run = Path(folder) / "run"
        sets = [
            *(
                "train.updates=4",
                "train.batch=2",
                "train.preview_every=0",
                "evaluate=false",
                f"data.prompts={prompts}",
            ),
            *("student.output=teacher", "options.fake_warm_start=0"),
        ]
        if size := SIZES.get(name):
            sets.append(f"data.size={[size.height, size.width, size.frames]}")
        stepdistill.distill(tiny_pipeline(name), "dmd", run, sets=sets)
        return [
            float(json.loads(line)["loss"]).hex() for line in (run / "stats.jsonl").read_text().splitlines()
        ]


def main() -> None:
    torch.set_num_threads(1)
    found = {f"method {name}": of_method(name) for name in method_names()}
    found |= {f"pipeline {name}": of_pipeline(name) for name in PIPELINES}
    if sys.argv[1:] == ["record"]:
        LEDGER.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} written to {LEDGER}")
        return
    before = json.loads(LEDGER.read_text())
    odd = [key for key in before.keys() | found.keys() if before.get(key) != found.get(key)]
    for key in sorted(odd):
        print(f"{key}: {before.get(key)} before, {found.get(key)} now")
    print(f"{len(found) - len(odd)} of {len(found)} are the same to the last bit")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
