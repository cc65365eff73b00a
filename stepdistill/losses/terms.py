"""Terms that any method's student can be given beside its own loss, by the recipe's ``terms``.

- Regression on cached pairs (Yin et al. 2023, 2311.18828, eq. 9): the student's clean prediction from a state of the
  teacher's trajectory against the trajectory's end. Of several experts, each at the times of its own calls.
- Perceptual: the same two, decoded, as unit features of an image network; |a - b|^2 = 2 - 2 cos. A student that is
  scored in the very network it learnt from scores better than it is.
- GAN (Yin et al. 2024, 2405.14867, 4.3): the student's samples against real images, told apart by a head on the frozen
  teacher's features of both, noised. Its turns alternate with the method's steps, which therefore take twice as many.
  Refused where a network of the student draws no clean sample, as all but the last of several experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import DISCRIMINATOR, FOLLOWERS, Method, MethodOptions
from stepdistill.losses.distances import distance
from stepdistill.losses.gan import FeatureGan
from stepdistill.losses.regression import ends
from stepdistill.networks.sampler import Sampler
from stepdistill.recipes.sections import TermOptions


class WithTerms(Method):
    """A method with further terms in its student's loss.

    Args:
        method: the method itself, its times as they will be sampled.
        terms: what is added.
        embed: latents [B, C, H, W] to unit features [B, D] of their images, with a graph; for the perceptual term.
    """

    def __init__(
        self, method: Method, terms: TermOptions, embed: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(method.teacher, method.student, method.times, MethodOptions())
        self.method, self.terms, self.embed = method, terms, embed
        self.gan = FeatureGan(method.teacher.denoiser) if terms.gan_weight else None
        spans = {name: method.span(name) for name in method.networks()}
        early = [name for name, span in spans.items() if span and span[1] < len(method.times)]
        if self.gan is not None and early:
            raise UserError(
                f"terms.gan_weight is {terms.gan_weight:g}, but {early[0]} draws no clean sample to be told from real "
                "images: set it to 0, or take a student of one network (options.phases=1)"
            )

    def networks(self) -> dict[str, nn.Module]:
        gan: dict[str, nn.Module] = {} if self.gan is None else {DISCRIMINATOR: self.gan}
        return {**self.method.networks(), **gan}

    def own_step(self, step: int) -> int:
        """The method's own step: every other one of the run where there is a discriminator."""
        return step if self.gan is None else step // 2

    def turn(self, step: int) -> str:
        # The discriminator comes first: the student never follows one that has not seen it.
        if self.gan is not None and step % 2 == 0:
            return DISCRIMINATOR
        return self.method.turn(self.own_step(step))

    def lr_ratio(self, turn: str, step: int) -> float:
        if turn == DISCRIMINATOR:
            return self.terms.gan_lr_ratio
        return self.method.lr_ratio(turn, self.own_step(step))

    def pair_times(self) -> tuple[float, ...]:
        return self.method.pair_times()

    def sampler(self) -> Sampler:
        return self.method.sampler()

    def after_step(self, step: int) -> None:
        if self.turn(step) != DISCRIMINATOR:
            self.method.after_step(self.own_step(step))

    def anew(self, step: int) -> frozenset[str]:
        return frozenset() if self.turn(step) == DISCRIMINATOR else self.method.anew(self.own_step(step))

    def sample(self, batch: Batch) -> Tensor:
        """The student's clean samples [B, C, H, W] of the batch's noise; the last call alone has a graph."""
        sampler, student = self.sampler(), self.student
        with torch.no_grad():
            x = sampler.walk(student, batch.noise, batch.cond, batch.fresh, sampler.steps - 1)
        t = torch.full((len(x),), sampler.times[-1], device=x.device)
        end = torch.zeros_like(t) if student.two_times else None
        return student.predict(x, t, batch.cond, end).x0

    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.terms
        if turn == DISCRIMINATOR:
            gan = cast(FeatureGan, self.gan)
            with torch.no_grad():
                x = self.sample(batch)
            loss = gan.for_discriminator(x, cast(Examples, batch.images), batch)
            return loss, {DISCRIMINATOR: loss}
        own = replace(batch, draws=replace(batch.draws, step=self.own_step(batch.draws.step)))
        loss, logs = self.method.loss(turn, own)
        if turn in FOLLOWERS:
            return loss, logs
        logs = dict(logs)
        if terms.regression_weight or terms.perceptual_weight:
            # The states that pairs keep are those of the method's pair times, which may be more than the student's own.
            times = (self.times[0], *self.pair_times())
            seen, wanted = ends(self.student, times, batch, self.method.span(turn))
            if terms.regression_weight:
                logs["term regression"] = distance(seen, wanted, terms.regression)
                loss = loss + terms.regression_weight * logs["term regression"]
            if terms.perceptual_weight:
                embed = cast("Callable[[Tensor], Tensor]", self.embed)
                with torch.no_grad():
                    target = embed(wanted)
                logs["term perceptual"] = (embed(seen) - target).square().sum(1).mean()
                loss = loss + terms.perceptual_weight * logs["term perceptual"]
        if self.gan is not None:
            logs["term gan"] = self.gan.for_generator(self.sample(batch), batch)
            loss = loss + terms.gan_weight * logs["term gan"]
        return loss, logs
