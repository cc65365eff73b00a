"""GNDM: DMD's field with one normaliser for the samples of a prompt, and rewards beside it.

After "R_dm", 2603.28460, of which the abstract alone was to be had: the equations are a reconstruction of ours (guess).

- x_1 .. x_G are samples of one prompt (``train.group``). They share one (t, eps), and one normaliser: field_i =
  (x0_fake - x0_real)_i / mean over j of mean|x_j - x0_real_j|. G = 1 is DMD. The field itself is not centred: a shift
  of the mean is the same for the whole group, and would be lost.
- ``climb_weight``: less the gradient of each reward of ``terms.reward`` in x_i, as large as the field there times the
  weight: field_i - weight sum_m rms(field_i) grad_m / rms(grad_m).
- Fake turn: the ordinary diffusion loss on sg[x], ``fake_updates`` times for each update of the student.

The rung with a policy and advantages (GNDMR's other half) is on-policy, and no part of this file.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.losses.batch import Batch
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views, loss_with_gradient, views_of
from stepdistill.losses.groups import mean_of_group


def rms(x: Tensor) -> Tensor:
    """The root mean square of each sample, [B, 1, ...]."""
    return x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt()


class GNDM(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        fake_updates: int = 5  # updates of the fake network per student update
        # Of each reward's gradient over the field's size; 0 leaves rewards out.
        climb_weight: Annotated[float, Field(ge=0)] = 0.0

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | ({"reward"} if self.climb_weight else set())

    options: Options

    @property
    def leaves_teacher(self) -> bool:
        return self.options.climb_weight > 0

    def views(self, x: Tensor, batch: Batch) -> Views:
        scale, group = self.options.score_scale, batch.group
        return views_of(self.fake, self.teacher, x, batch, self.options, scale, group=group)

    def field(self, x: Tensor, batch: Batch) -> Tensor:
        """The error over its group's normaliser, [B, C, H, W]: where x should move away from."""
        views = self.views(x, batch)
        return views.error / (mean_of_group(views.distance, batch.group) + 1e-6)

    def climb(self, x: Tensor, field: Tensor, batch: Batch) -> Tensor:
        """The sum of the rewards' gradients at x, each as large as the field of its sample, [B, C, H, W]."""
        assert self.rewards is not None
        gradients = self.rewards.gradients(x, batch.prompt)
        return torch.stack([rms(field) * each / (rms(each) + 1e-12) for each in gradients]).sum(0)

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            field = self.field(x, batch)
            logs = {"field": mean_size(field)}
            if self.options.climb_weight:
                field = field - self.options.climb_weight * self.climb(x, field, batch)
        return loss_with_gradient(x, field), logs
