"""The optimisers of ``train.optimizer``.

Adafactor (Shazeer and Stern 2018, 1804.04235) keeps of a matrix's second moments their means over rows and columns, and
no first moments, where AdamW keeps two numbers a weight. It is taken as transformers has it, which factors the last two
dimensions of whatever has two or more: of a linear layer next to nothing is kept, of a kernel of 3x3 two numbers for
three weights, of one of 1x1 as much as AdamW keeps. The run sets its rate; steps relative to a weight's size are off.

AdamW in eight bits (Dettmers et al. 2021, 2110.02861) keeps both moments of whatever has 4,096 weights or more as codes
of a byte, with a scale for every 256; it is taken from bitsandbytes, which also runs on a CPU.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.training.parallel import by_kind


def check_optimizer(name: str, device: torch.device) -> None:
    """Whether ``train.optimizer`` is to be had on a device.

    Raises:
        UserError: it is not, with what is missing.
    """
    if name != "adamw8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer is adamw8bit, which needs bitsandbytes, and that is not installed: pip install "
            '"stepdistill[quantized]", or set train.optimizer=adamw'
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"train.optimizer is adamw8bit, which runs on cpu and cuda, and this run is on {device.type}: set "
            "train.optimizer=adamw"
        )


def optimizer_of(options: TrainOptions, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What updates the parameters of one network."""
    groups = by_kind(parameters)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )
    made: torch.optim.Optimizer
    if options.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        made = AdamW8bit(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
        return made
    from transformers.optimization import Adafactor

    made = Adafactor(
        groups, lr=options.lr, weight_decay=options.weight_decay, scale_parameter=False, relative_step=False
    )
    return made
