"""The optimisers of ``train.optimizer``.

Adafactor (Shazeer and Stern 2018, 1804.04235) keeps of a matrix's second moments their means over rows and columns, and
no first moments, where AdamW keeps two numbers a weight. It is taken as transformers has it, which factors the last two
dimensions of whatever has two or more: of a linear layer next to nothing is kept, of a kernel of 3x3 two numbers for
three weights, of one of 1x1 as much as AdamW keeps. The run sets its rate; steps relative to a weight's size are off.
"""

from __future__ import annotations

import torch
from torch import nn

from stepdistill.recipes.sections import TrainOptions
from stepdistill.training.parallel import by_kind


def optimizer_of(options: TrainOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What updates the parameters of one network."""
    groups = by_kind(parameters)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(
        groups, lr=options.lr, weight_decay=options.weight_decay, scale_parameter=False, relative_step=False
    )
    return made
