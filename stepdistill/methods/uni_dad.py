"""Uni-DAD: fewer steps and a new domain at once, from ten images of it.

"Uni-DAD: Unified Distillation and Adaptation of Diffusion Models for Few-step Few-shot Image Generation", 2025,
2511.18281. Paper and code differ; the paper, of which a summary was at hand, is the default.

- Two teachers: the source's, frozen, and one of the target domain, which starts as it and learns the few images by the
  ordinary diffusion loss, once for each update of the student. Student turn: DMD's field towards both,
  ((1 - a) (x0_fake - x0_source) + a (x0_fake - x0_target)), with a = ``target_share``: 0.25 for a near domain, 0.75 for
  a far one. At a < 1 the source holds the diversity that ten images have not.
- Both are over one normaliser, mean|x - x0_fake| (the paper's sigma d / |eps - eps_fake|_1, in x0). ``normaliser: own``
  is the code's: each over mean|x - x0| of its own teacher.
- Heads at several depths of the fake network's way down and its middle, each with a loss of its own, tell the student's
  samples from the images, both noised. They carry a near domain, the target's teacher a far one.
- Fake turns, ``fake_updates`` for each of the student: the diffusion loss on sg[x], and the heads' loss.

Guidance is the source's alone (ours). Nothing augments the images; with ten of them the target's teacher knows them by
heart in time: keep a below 1, or its rate (``target_lr_ratio``) low.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import (
    ScoreMethod,
    ScoreOptions,
    Views,
    denoising_loss,
    loss_with_gradient,
    turn_at,
)
from stepdistill.losses.gan import FeatureGan


class UniDAD(ScoreMethod):
    """See the module's text."""

    class Options(ScoreOptions):
        fake_updates: PositiveInt = 5  # updates of the fake network per student update
        adversarial_weight: Annotated[float, Field(ge=0)] = 0.01  # of the generator's GAN loss
        discriminator_weight: Annotated[float, Field(ge=0)] = 0.03  # of the heads' loss in the fake turn
        target_share: Annotated[float, Field(ge=0, le=1)] = 0.25  # a: 0 leaves the target's teacher out
        target_lr_ratio: PositiveFloat = 1.0  # learning rate of the target's teacher over train.lr
        normaliser: Literal["fake", "own"] = "fake"  # of the field: the paper's, or the code's

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | ({"images"} if self.target_share else set())

    options: Options

    def setup(self) -> None:
        super().setup()
        self.gan = FeatureGan(self.fake, deep=True) if self.options.adversarial_weight else None
        self.target = self.roles.add("target") if self.options.target_share else None

    @property
    def leaves_teacher(self) -> bool:
        return self.target is not None

    def trained(self) -> dict[str, Trained]:
        target = {"target": Trained("target", follows=True, of_data=True)} if self.target else {}
        return {**super().trained(), **target}

    def turn(self, step: int) -> Turn:
        options = self.options
        since = step - options.warm_start - options.fake_warm_start
        cycle = options.fake_updates + 2
        if self.target is None or since < 0:
            return Turn(turn_at(step, options, options.warm_start), step)
        names = {cycle - 2: "target", cycle - 1: "student"}
        return Turn(names.get(since % cycle, "fake"), step)

    def lr_ratio(self, turn: Turn) -> float:
        return self.options.target_lr_ratio if turn.network == "target" else super().lr_ratio(turn)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        if turn.network != "target" or self.target is None:
            return super().loss(turn, batch)
        images = cast(Examples, batch.images)
        loss = denoising_loss(
            self.target, images.x0, replace(batch, cond=images.cond), self.options.fake_loss
        )
        return Loss(loss, {"denoising": loss})

    def field(self, views: Views, batch: Batch) -> Tensor:
        """Where x should move away from, [B, C, H, W]."""
        share, both = self.options.target_share, [(1 - self.options.target_share, views)]
        if self.target is not None:
            both.append((share, replace(views, real=self.target.predict(views.x_t, views.t, batch.cond))))
        if self.options.normaliser == "own":
            return torch.stack([weight * own.field for weight, own in both]).sum(0)
        scale = replace(views, real=views.fake).distance + 1e-6
        return torch.stack([weight * own.error for weight, own in both]).sum(0) / scale

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            field = self.field(self.views(x, batch), batch)
        return loss_with_gradient(x, field), {"field": mean_size(field)}
