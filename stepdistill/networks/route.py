"""Several frozen teachers, each for the prompts that are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.diffusion.path import Prediction
from stepdistill.families.condition import Condition
from stepdistill.networks.teacher import Teacher


@dataclass(frozen=True)
class Route:
    """Which teacher each prompt belongs to.

    Attributes:
        teachers: by name; the first is the one that is distilled, whose path and conditions all have.
        of_prompt: which of them, by its number, each of the run's prompts belongs to, [P] on the CPU; None where there
            is one teacher.
        weak: a weaker version of the first, which may guide it at all prompts; no prompt is its own.
    """

    teachers: Mapping[str, Teacher]
    of_prompt: Tensor | None = None
    weak: Teacher | None = None

    def predict(
        self, x_t: Tensor, t: Tensor, cond: Condition, prompt: Tensor, guidance: Mapping[str, float]
    ) -> Prediction:
        """What the teacher of each sample's prompt says about x_t [B, ...] at t [B]; none is called for the prompts of
        another.

        Args:
            x_t, t, cond: of the B samples.
            prompt: which of the run's prompts each sample is of, [B] on the CPU.
            guidance: the scale of each teacher, by its name.
        """
        named = self.teachers.items()
        if self.of_prompt is None:
            return next(each.predict(x_t, t, cond, guidance=guidance[name]) for name, each in named)
        owner = self.of_prompt[prompt]
        x0, eps = torch.empty_like(x_t), torch.empty_like(x_t)
        for number, (name, teacher) in enumerate(named):
            own = (owner == number).nonzero().flatten()
            if len(own):
                said = teacher.predict(x_t[own], t[own], cond.rows(own), guidance=guidance[name])
                x0[own], eps[own] = said.x0, said.eps
        return Prediction(next(iter(self.teachers.values())).path, x0, eps, t)
