"""ASD: DMD for a student that draws in several step counts, each led to the next larger one by a discriminator.

"Adversarial Self-Distillation", ICLR 2026, 2511.01419: causal video in one or two steps; its form for images. Only a
summary was at hand: what is marked (guess) is not from the paper.

- G^n is the student at every (K / n)-th of its K times, for each n that divides K: at four times one, two and four
  steps (guess: the paper has n and n + 1 steps of a list of four). A rollout draws n first. It ends at n's last call,
  so that x = G^n(z); with n = K at any of the K calls, as DMD's.
- Student turn: DMD's field at x, whatever n is (dmd.py). For n < K beside it J_n, the relativistic loss
  softplus(-(D_n(x_t) - D_n(y_t))): y = sg G^n'(z'), n' the next larger count, of the same prompts from other noise. The
  distance from n to n' steps is far smaller than that to the teacher.
- Fake turn: the ordinary diffusion loss on sg[x]. D_n learns the other side, softplus(-(D_n(y_t) - D_n(x_t))), and
  pays gamma / 2 |dD_n / dx_t|^2 at both, as in R3GAN. It is output n of one head on features of the fake network, which
  it leaves as they are. Where n = K a pair is drawn for it.
- x and y are noised to one time t, each by noise of its own: a logit is then free by a function of t alone.
- The squared slope is that along random directions, (D(x_t + delta e) - D(x_t))^2 / delta^2: without a second backward
  pass. ``self_weight`` and gamma are start values of ours (guess): the first such that the discriminator's pull on x
  is about a tenth of DMD's field, which ``share`` of the log says.

With one time there is no pair, and it is DMD. Left out: causal video, and its first frames in more steps (FFE).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Trained
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, loss_with_gradient, rollout
from stepdistill.losses.gan import FeatureGan, relativistic_loss
from stepdistill.networks.sampler import Sampler

NotNegative = Annotated[float, Field(ge=0)]
SLOPE_STEP = 0.1
"""How far a slope of a logit is taken, over noise of deviation 1."""


class ASD(ScoreMethod):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(ScoreOptions):
        fake_updates: int = 5  # updates of the fake network per student update
        self_weight: NotNegative = 0.2  # of the loss against the student's own samples of more steps
        slope_weight: NotNegative = 0.1  # gamma, of their squared slopes

    options: Options

    def setup(self) -> None:
        super().setup()
        pairs = len(self.counts) - 1 if self.options.self_weight else 0
        self.own = FeatureGan(self.fake, pairs, relativistic=True) if pairs else None

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that the student draws in, ascending: the divisors of the number of its times."""
        steps = len(self.times)
        return tuple(n for n in range(1, steps + 1) if steps % n == 0)

    def trained(self) -> dict[str, Trained]:
        heads = [head for head in (self.gan, self.own) if head is not None]
        extra = nn.ModuleList(heads) if heads else None
        return {**super().trained(), "fake": Trained("fake", extra, follows=True)}

    def sampler(self) -> Sampler:
        return replace(super().sampler(), counts=self.counts)

    def place(self, batch: Batch) -> int:
        """Where the number of steps of this batch's rollout stands in ``counts``: one for the whole batch."""
        return batch.draws.shared_integer("count", len(self.counts))

    def drawn(self, place: int, batch: Batch, who: Literal["", "other "] = "") -> Tensor:
        """G^n [B, ...] from the batch's noise, or from other noise; the last call alone has a graph."""
        usual, draws = self.sampler(), batch.draws
        sampler = replace(usual, times=self.times[:: usual.steps // self.counts[place]])
        noise = draws.normal(f"{who}noise", batch.shape)

        def fresh(call: int) -> Tensor:
            return draws.normal(f"{who}renoise {call}", batch.shape)

        return sampler.draw(self.student, noise, batch.cond, fresh)

    def generate(self, batch: Batch) -> Tensor:
        """G^n of a drawn n; of n = K the clean prediction at a drawn call. Only one call has a graph."""
        place = self.place(batch)
        if place == len(self.counts) - 1:
            return rollout(self.student, self.sampler(), batch)
        return self.drawn(place, batch)

    def logits(self, x: Tensor, y: Tensor, place: int, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """D_n(x_t), D_n(y_t), [B] each, and the mean of their squared slopes. Only x may have a graph in its features:
        where it has none, the head alone learns."""
        assert self.own is not None
        draws, path = batch.draws, self.fake.path
        t, found, slopes = path.shifted(draws.uniform("own t")), [], []
        for name, sample in (("x", x), ("y", y)):
            x_t = path.noised(sample, draws.normal(f"own {name} eps", batch.shape), t)
            way = SLOPE_STEP * draws.normal(f"own {name} slope", batch.shape)
            with torch.set_grad_enabled(sample.requires_grad):
                seen = self.fake.features(x_t, t, batch.cond)
                aside = None if x.requires_grad else self.fake.features(x_t + way, t, batch.cond)
            found.append(self.own.head(seen, place))
            if aside is not None:
                slopes.append(((self.own.head(aside, place) - found[-1]) / SLOPE_STEP).square())
        return found[0], found[1], torch.stack(slopes).sum(0).mean() if slopes else found[0].new_zeros(())

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            field, place = self.views(x, batch).field, self.place(batch)
        logs = {"field": mean_size(field)}
        if self.own is not None and place < len(self.counts) - 1:
            with torch.no_grad():
                y = self.drawn(place + 1, batch, "other ")
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                ours, theirs, _ = self.logits(leaf, y, place, batch)
                told = relativistic_loss(better=ours, worse=theirs)
                (pull,) = torch.autograd.grad(told, leaf)
            pull = self.options.self_weight * x.numel() * pull  # of each sample by itself, as the field is
            logs |= {"own": told.detach(), "share": pull.norm() / field.norm().clamp_min(1e-12)}
            field = field + pull
        return loss_with_gradient(x, field), logs

    def following(self, x: Tensor, batch: Batch) -> Loss:
        found = super().following(x, batch)
        if self.own is None:
            return found
        last, place = len(self.counts) - 1, self.place(batch)
        with torch.no_grad():
            if place == last:  # x ends at any call, and there is no larger number of steps
                place = batch.draws.shared_integer("pair", last)
                x = self.drawn(place, batch)
            y = self.drawn(place + 1, batch, "other ")
        ours, theirs, slopes = self.logits(x, y, place, batch)
        told = relativistic_loss(better=theirs, worse=ours)
        value = told + 0.5 * self.options.slope_weight * slopes
        logs = {**found.logs, "own discriminator": told, "slope": slopes}
        return Loss(found.value + self.options.discriminator_weight * value, logs)
