"""Writes docs/reference/plans.md, what recipes of real teachers need: python train/plans.py [NAME ...]

One after the other, each in a process of its own, a minute or so of one core each. What is there and planned for the
same recipe stays as it is, so that a second call goes on where a first was stopped; a name plans a recipe anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RECIPES = FOLDER / "recipes"
FILE, ROWS = FOLDER.parent / "docs" / "reference" / "plans.md", FOLDER / "plans.json"
CARDS = (24, 48, 80, 141)
"""GiB of usual ones."""

KEYS = ("batch", "accumulate", "precision", "weights", "optimizer", "checkpointing", "updates", "parallel")
HEADS = (
    "recipe",
    "teacher, what is drawn",
    "millions of parameters: of the teacher, trained",
    "batch, in parts of",
    "GiB at the peak",
    "of an ordinary LoRA's",
    "card that holds it",
    "GiB on disk",
    "one H100 at 35 %, pairs and updates",
)
TEXT = """# What the recipes of real teachers need

Written by `python train/plans.py` with `stepdistill plan`, from configs alone: no run at full size stands behind it. Of
one GPU that does the whole batch. [eval/bench/README.md](../../eval/bench/README.md) compares such plans with what is
measured.

{table}

GiB at the peak: what torch holds at the worst moment, of an update, while a picture is decoded, or before the first
update, when text encoders are there too; a card needs 1 GiB more. An ordinary LoRA's is the same of one adapter of the
same network that is fine-tuned on pictures. On disk lie the kept checkpoints, the student, and caches of 1,000 prompts
and of the pairs.
"""


def names() -> list[str]:
    """The recipes whose teacher does not ship."""
    return [file.stem for file in sorted(RECIPES.glob("*.yaml")) if "emoji" not in file.stem]


def asked(name: str) -> dict[str, Any]:
    """What of a recipe its plan depends on."""
    from stepdistill.recipes.recipe import load_recipe

    recipe = load_recipe(str(RECIPES / f"{name}.yaml"))
    said, train = recipe.model_dump(mode="json", exclude_defaults=True), recipe.train.model_dump(mode="json")
    found = {key: said.get(key) for key in ("teacher", "method", "options", "student", "terms")}
    size = list(recipe.data.size) if recipe.data.size else None
    return {**found, "size": size, "train": {key: train[key] for key in KEYS}}


def planned(name: str) -> dict[str, Any]:
    """The plan of a recipe, as `stepdistill plan --json` has it, made in a process of its own."""
    command = (sys.executable, "-m", "stepdistill", "plan", str(RECIPES / f"{name}.yaml"), "--json")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def row(name: str, plan: dict[str, Any]) -> list[str]:
    """The line of a recipe in the table."""
    from stepdistill.planning.table import duration

    said, trace = plan["recipe"], plan["trace"]
    need = plan["peak"] / 2**30
    card = next((f"{size} GB" for size in CARDS if need + 1 <= size), "none: several GPUs")
    kind = f"LoRA of rank {said['lora_rank']}" if said["lora_rank"] else "all weights"
    trained = " + ".join(f"{count / 1e6:,.0f}" for count in trace["trained"].values())
    return [
        f"`{name}`",
        f"{trace['source'].partition(',')[0]}, {said['size']}",
        f"{trace['parameters']['teacher'] / 1e6:,.0f}, {trained} ({kind})",
        f"{said['batch']}, {said['batch'] // said['accumulate']}",
        f"{need:.1f}",
        f"{plan['ratio']:.2f} times" if plan["ratio"] else "",
        card,
        f"{sum(plan['disk'].values()) / 2**30:,.0f}",
        duration(plan["hours"]["h100"] + plan["pair_hours"].get("h100", 0.0)),
    ]


def text(rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [HEADS, ("---",) * len(HEADS), *(rows[name]["row"] for name in names() if name in rows)]
    return TEXT.format(table="\n".join(f"| {' | '.join(line)} |" for line in lines))


def main() -> None:
    rows = json.loads(ROWS.read_text("utf-8")) if ROWS.is_file() else {}
    for name in names():
        wanted = asked(name)
        if name not in sys.argv[1:] and rows.get(name, {}).get("asked") == wanted:
            continue
        print(name, flush=True)
        rows[name] = {"asked": wanted, "row": row(name, planned(name))}
        rows = {each: rows[each] for each in names() if each in rows}
        ROWS.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        FILE.write_text(text(rows), "utf-8")
    FILE.write_text(text(rows), "utf-8")  # the words around the table may have changed


if __name__ == "__main__":
    main()
