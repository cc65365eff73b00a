"""Learning rates over a run."""

from __future__ import annotations

from stepdistill.losses.regression import annealed
from stepdistill.recipes.train_options import TrainOptions


def learning_rate(options: TrainOptions, step: int) -> float:
    """The learning rate at a step: linear warm-up, then constant, or down to 0 linearly or by a cosine."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.updates - options.warmup)
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * annealed(done) if options.schedule == "cosine" else options.lr
