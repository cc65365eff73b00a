"""What ``stepdistill train`` does, as a script: the file to start under torchrun or to copy and change.

python train/distill.py dmd_emoji_quick --output runs/dmd --set train.updates=500
torchrun --nproc_per_node 2 train/distill.py dmd_emoji_quick --output runs/dmd
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.distil import run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil one recipe.")
    parser.add_argument("recipe", help="shipped recipe, or a .yaml file")
    parser.add_argument("--output", type=Path, required=True, help="run folder")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    recipe = load_recipe(arguments.recipe, sets=arguments.sets)
    command = shlex.join(["python", *sys.argv])
    run = run_recipe(recipe, output=arguments.output, resume=arguments.resume, command=command)
    if run.report is not None:
        print(run.student)


if __name__ == "__main__":
    main()
