"""Rewards: how good a student's samples are, and the term that lets it climb one.

Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (DRaFT), 2309.17400: the gradient
of a reward of the decoded sample, through the sample into the network. DRaFT-1 keeps the graph of the last call alone,
as here. What climbs a network is scored better by that network than it is: measure with another one.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stepdistill.losses.terms import Shown, Term


class Reward(Protocol):
    """How good samples are."""

    def __call__(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """A number for each sample, [B], higher is better, with a graph into x0.

        Args:
            x0: clean latents [B, ...].
            prompt: which of the run's prompts each was drawn for, [B].
        """
        ...


class RewardTerm(Term):
    """Less the mean reward of the student's clean samples.

    Args:
        weight: of the term.
        reward: what is climbed.
    """

    name = "reward"
    of_samples = True

    def __init__(self, weight: float, reward: Reward) -> None:
        super().__init__(weight)
        self.reward = reward

    def value(self, shown: Shown) -> Tensor:
        return -self.reward(shown.sample, shown.batch.prompt).mean()
