"""Short runs on a tiny teacher: their recipes, without any shipped one under them."""

from __future__ import annotations

from pathlib import Path

from tiny_folder import tiny_folder

from stepdistill.recipes.recipe import load_recipe

HERE = Path(__file__).parent
COMMON = [
    f"teacher={tiny_folder('sd')}",
    f"data.prompts={HERE / 'prompts.txt'}",
    "train.batch=4",
    "train.checkpoint_every=5",
    "train.preview_every=0",
    "train.average=0.9",
    "train.lr=1e-4",
    "options.guidance=2.0",
    "evaluate=false",
]
METHODS = {
    "dmd": ["options.fake_updates=1", "student.times=[1.0, 0.5]", "options.pairs=8", "options.pair_steps=2",
            "options.warm_start=3", "options.pair_weight=0.1"],
    "lcm": ["options.pairs=8", "options.pair_steps=2", "options.grid=10"],
    "reflow": ["options.pairs=8", "options.pair_steps=2", "options.reflow_updates=7", "options.fresh=0.5"],
}  # fmt: skip


def recipe_of(method, steps, *more):
    empty = HERE / "empty.yaml"
    sets = [*COMMON, *METHODS[method], f"train.updates={steps}", *more]
    return load_recipe(empty, method=method, sets=sets)


def emoji_recipe_of(method, steps, *more):
    """The same on the embedded teacher, which has learnt to draw."""
    return recipe_of(method, steps, "teacher=emoji", *more)
