"""The term that lets a student climb rewards of its samples.

Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (DRaFT), 2309.17400: the gradient
of a reward of the decoded sample, through the sample into the network. DRaFT-1 keeps the graph of the last call alone.
Li et al. 2024, "Reward Guided Latent Consistency Distillation" (RG-LCD), 2403.11027: of the clean prediction that a
method's own loss is of. Ren et al. 2024, "Hyper-SD", 2404.13686: relu(target - reward), until it is good enough.

What climbs a network is scored better by that network than it is: measure with another one. Two guards are ours: no
reward of predictions from much noise, which are a blur, and no gradient of it above the method's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import Shown, Term

RewardOf = Literal["sample", "prediction"]
"""What is judged: clean samples as they are drawn, or the clean predictions that the method's own loss is of."""


@dataclass(frozen=True)
class RewardOptions:
    """How a reward is climbed: the keys ``terms.reward_<name>`` of a recipe, see ``TermOptions``."""

    of: RewardOf = "sample"
    share: float = 1.0
    after: int = 0
    last_call: bool = True
    below: float = 1.0
    bounded: bool = False
    target: float | None = None


def norms(x: Tensor) -> Tensor:
    """The norm of each sample, [B, 1, ...]."""
    each: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return each.view(-1, *[1] * (x.ndim - 1))


class RewardTerm(Term):
    """Less the mean reward of the student's clean samples or predictions.

    The gradient is taken at once, in the sample, so that no graph of a decoder or a judge waits beside the student's.

    Args:
        weight: of the term.
        rewards: what is climbed.
        options: how.
    """

    name = "reward"

    def __init__(self, weight: float, rewards: Rewards, options: RewardOptions | None = None) -> None:
        super().__init__(weight)
        self.rewards, self.options = rewards, options or RewardOptions()
        self.of_samples = self.options.of == "sample"
        self.reads = frozenset({self.options.of} if self.options.bounded or not self.of_samples else ())
        self.after = self.options.after

    def judged(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """What is climbed of clean latents [B, ...], [B], with a graph."""
        return self.rewards.total(x0, prompt)

    def rows(self, shown: Shown) -> slice:
        """The samples that are decoded: the same ones of the global batch however it is cut."""
        every = round(1 / self.options.share)
        return slice((-1 - shown.batch.draws.first) % every, None, every)

    def value(self, shown: Shown) -> Tensor:
        options, rows = self.options, self.rows(shown)
        if options.of == "prediction":
            seen = shown.predicted
            x0, prompt, near = seen.x0, seen.of_prompts(), seen.t <= options.below
        else:
            x0, prompt, near = shown.drawn(options.last_call), shown.batch.prompt, None
        part, whose = x0[rows], prompt[rows]
        if not len(part):  # a small part of a batch
            return x0.new_zeros(())
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            score = self.judged(leaf, whose)
            wanting = -score if options.target is None else torch.relu(options.target - score)
            if near is not None:
                wanting = wanting * near[rows]
            value = wanting.sum() / (len(x0) * options.share)
            (gradient,) = torch.autograd.grad(value, leaf)
        if options.bounded:
            most = norms(shown.own_gradient(x0)[rows])
            gradient = gradient * (most / (self.weight * norms(gradient) + 1e-20)).clamp_max(1)
        return value.detach() + ((part - part.detach()) * gradient).sum()
