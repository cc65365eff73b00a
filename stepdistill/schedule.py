"""Learning rates over a run."""

from __future__ import annotations

import math

from stepdistill.sections import TrainOptions


def annealed(done: float) -> float:
    """The half cosine from 1 at done = 0 to 0 at done = 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def learning_rate(options: TrainOptions, step: int) -> float:
    """The learning rate at a step: linear warm-up, then constant, or down to 0 linearly or by a cosine."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * annealed(done) if options.schedule == "cosine" else options.lr
