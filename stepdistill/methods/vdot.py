"""VDOT: DMD's field, and beside it the optimal transport between the tokens of what the two networks see.

"VDOT: Efficient Unified Video Creation via Optimal Transport Distillation", 2025, 2512.06802. Only a summary was at
hand: what is marked (guess) is not from the paper.

- a, b: the tokens (spatial places; each frame of a video by itself) of x0_fake and x0_real at one noised sample. The
  entropic plan T between them, with squared distances as cost, says which tokens belong together where the two
  distributions hardly overlap and a difference place by place points nowhere.
- Student turn: g_i = n sum_j T_ij (a_i - b_j), T without a gradient, is the field of the transport term; DMD's own,
  x0_fake - x0_real, stands beside it with ``matching_weight``. Both are over mean|x - x0_real| (guess: the summary
  has no normaliser for the first).
- Entropy draws g towards the mean of b, even at a = b; ``debiased`` takes that away, n sum_j T'_ij (a_i - a_j) with the
  plan T' from a to itself (Feydy et al. 2019, 1810.08278; guess).
- ``through_networks``: the other reading of "the gradient in x_t", the cost <T, |a - b|^2> differentiated through the
  inputs of both networks.
- ``layout``: a cost of moving, which the paper has not; from 0 up it ties tokens to their places, until g is DMD's.
- Fake turn: the ordinary diffusion loss on sg[x], ``fake_updates`` times for each update of the student.

Differs from the paper: its relativistic GAN takes every second update; here ``adversarial_weight`` is DMD2's GAN,
beside the rest. Strength of the entropy, iterations and both weights are start values of ours (guess).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.losses.batch import Batch
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views, loss_with_gradient
from stepdistill.losses.transport import (
    displacement,
    from_tokens,
    places,
    sinkhorn,
    squared_distances,
    tokens,
    transported,
)

NotNegative = Annotated[float, Field(ge=0)]


class VDOT(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        fake_updates: int = 5  # updates of the fake network per student update
        transport_weight: NotNegative = 1.0  # of the transport's field
        matching_weight: NotNegative = 1.0  # of DMD's field beside it
        entropy: PositiveFloat = 0.05  # over the mean cost of a sample
        iterations: PositiveInt = 60  # of Sinkhorn's algorithm
        layout: NotNegative = 0.0  # cost of moving across the picture, over the mean cost
        debiased: bool = True  # without what entropy adds
        through_networks: bool = False  # the gradient through both networks' inputs

    options: Options

    def setup(self) -> None:
        super().setup()
        self.through_inputs = self.options.through_networks

    @torch.no_grad()
    def plan(self, a: Tensor, b: Tensor, entropy: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """The plan from a to b [B, n, C], and the entropy [B, 1, 1] it was made with: a given one, or the options'."""
        cost = squared_distances(a, b)
        mean = cost.mean(dim=(1, 2), keepdim=True)
        if self.options.layout:
            where = places(like)[None]
            cost = cost + self.options.layout * mean * squared_distances(where, where)
        if entropy is None:
            entropy = (self.options.entropy * mean).clamp_min(1e-12)
        return sinkhorn(cost, entropy, self.options.iterations), entropy

    def plans(self, views: Views, of_real: bool) -> list[tuple[float, Tensor, Tensor, Tensor]]:
        """The terms of the transport's cost: weight, plan, and the clouds [B, n, C] between which it lies; without
        ``of_real`` those alone that x0_fake is in."""
        a, b = tokens(views.fake.x0.float()), tokens(views.real.x0.float())
        forth, entropy = self.plan(a, b, None, views.x)
        clouds = [a, b][: 1 + of_real] if self.options.debiased else []
        own = [(-0.5, self.plan(each, each, entropy, views.x)[0], each, each) for each in clouds]
        return [(1.0, forth, a, b), *own]

    def transport(self, views: Views) -> Tensor:
        """The transport's field in x0_fake, [B, C, H, W]."""
        (_, forth, a, b), *own = self.plans(views, of_real=False)
        field = displacement(forth, a, b)
        if own:
            field = field - displacement(own[0][1], a, a)
        return from_tokens(field, views.x)

    def transport_cost(self, views: Views) -> Tensor:
        """Half the cost of each sample, [B], with a graph through both clouds: its gradient in x0_fake is the field."""
        costs = [weight * transported(plan, a, b) for weight, plan, a, b in self.plans(views, of_real=True)]
        return 0.5 * torch.stack(costs).sum(0).reshape(len(views.x), -1).sum(1)

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(x, batch)
        with torch.autocast(x.device.type, enabled=False):  # plans are sums of small numbers
            return self.matched(x, views)

    def matched(self, x: Tensor, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of samples x [B, C, H, W] by what both networks say of them, and what is logged."""
        options = self.options
        with torch.no_grad():
            scale = views.distance + 1e-6
            field = options.matching_weight * views.field
        if options.through_networks:
            cost = self.transport_cost(views) / (scale.flatten() * x.shape[1:].numel())
            loss = loss_with_gradient(x, field) + options.transport_weight * cost.mean()
            return loss, {"field": mean_size(field), "transport": cost.detach().mean()}
        moved = options.transport_weight * self.transport(views) / scale
        logs = {"field": mean_size(field), "transport": mean_size(moved)}
        return loss_with_gradient(x, field + moved), logs
