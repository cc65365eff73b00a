"""GNDMR: the steps of a few-step student are a policy, and how real its samples look is one of the rewards.

After "R_dm", 2603.28460, of which the abstract alone was to be had: the equations are a reconstruction of ours (guess),
made the way of RTDMD, 2026, 2605.26108, from a public implementation of that. GNDM has the rungs below.

- Rollout: the first ``policy_steps`` of K calls with a share ``eta`` of fresh noise, Gaussian actions; the others, of
  which the last gives x, as the student draws.
- R_dm(x) = 1/2 int (|x0_fake - x|^2 - |x0_real - x|^2) d SNR by a few noisings (t, eps) of x, which a prompt's samples
  share: over all noise it is log p_real - log p_fake up to a number. No gradient of it is asked for.
- Advantage: ``matching_weight`` R_dm and ``climb_weight`` times each of ``terms.reward``, all standardised among the
  samples of a prompt (``train.group``), added, and standardised again. The loss of each action is minus that times the
  log density, per element. Where the sum is one number for all samples nothing is learnt: as they are, without
  standardising, that is at p_real exp(w R), tilted by the reward.
- ``field_weight``: DMD's loss of x beside it, which alone trains the last call.
- Fake turn: the ordinary diffusion loss on sg[x], ``fake_updates`` times for each update of the student.

Differs from RTDMD: one update for each rollout, so that the ratio of policies is 1 and nothing clips it; advantages are
standardised again in their group, not over the batch; the fake network has no consistency term of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.fake_score import ScoreMethod, ScoreOptions, Views, loss_with_gradient, views_of
from stepdistill.losses.groups import standardised
from stepdistill.losses.rollout import Visit, log_density, mean_of_step, visits

Weight = Annotated[float, Field(ge=0)]


class GNDMR(ScoreMethod):
    """See the module's text."""

    default_times = uniform_times(4)
    starts_below = False  # the policy's actions lie on the path

    class Options(ScoreOptions):
        fake_updates: int = 5  # updates of the fake network per student update
        eta: Annotated[PositiveFloat, Field(le=1)] = 0.9  # share of fresh noise in the policy's steps
        policy_steps: PositiveInt = 2  # the first so many, of all but the last
        noisings: PositiveInt = 4  # of a sample, for its R_dm
        matching_weight: Weight = 1.0  # of R_dm in the advantage
        climb_weight: Weight = 1.0  # of each reward there; 0 leaves rewards out
        field_weight: Weight = 1e-3  # of DMD's loss

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"group"} | ({"reward"} if self.climb_weight else set())

    options: Options

    def setup(self) -> None:
        super().setup()
        if len(self.times) < 2:
            raise UserError(
                f"student.times is {list(self.times)}, but the last call draws nothing, and a policy needs one that "
                "does: give two or more, or take method gndm"
            )

    @property
    def leaves_teacher(self) -> bool:
        return self.options.climb_weight > 0

    @property
    def actions(self) -> int:
        """How many of the calls are the policy's."""
        return min(self.options.policy_steps, len(self.times) - 1)

    def policy(self, batch: Batch) -> list[Visit]:
        """The states and actions of the policy's steps."""
        sampler, options = self.sampler(), self.options
        return visits(self.student, sampler, batch, batch.cond, options.eta, self.actions)

    def generate(self, batch: Batch) -> Tensor:
        """The sample [B, ...] that the policy's actions and the steps after them lead to; the last call has a graph."""
        rest = replace(self.sampler(), times=self.times[self.actions :])
        state = self.policy(batch)[-1].step.state
        return rest.draw(self.student, state, batch.cond, lambda call: batch.fresh(self.actions + call))

    def views_at(self, x: Tensor, batch: Batch, name: str) -> Views:
        """Both networks' views of samples at a noising that their groups share."""
        options, group = self.options, batch.group
        return views_of(
            self.fake, self.teacher, x, batch, options, options.score_scale, group=group, stream=name
        )

    def realness(self, x: Tensor, batch: Batch) -> Tensor:
        """R_dm of samples x [B, ...], [B]."""
        total, path = x.new_zeros(len(x)), self.fake.path
        for i in range(self.options.noisings):
            views = self.views_at(x, batch, f"noising {i}")
            fake, real = ((said.x0 - x).square().flatten(1).sum(1) for said in (views.fake, views.real))
            # A time shift adds a number to log SNR: its rate is that of the times that were drawn evenly.
            even = path.unshifted(views.t)
            (alpha, sigma), (alpha_rate, sigma_rate) = path.alpha_sigma(even), path.rates(even)
            snr = (2 * path.log_snr_half(views.t)).exp()
            total = total + (fake - real) * snr * (sigma_rate / sigma - alpha_rate / alpha)
        low, high = self.options.score_times
        return total * (high - low) / self.options.noisings

    def advantage(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """How much better samples are than the others of their prompt, [B], and what to log."""
        options, realness = self.options, self.realness(x, batch)
        total, logs = options.matching_weight * standardised(realness, batch.group), {"real": realness.mean()}
        if options.climb_weight:
            assert self.rewards is not None
            scores = self.rewards.scores(x, batch.prompt)
            logs["reward"] = scores.sum(0).mean()
            total = total + options.climb_weight * standardised(scores.T, batch.group).sum(1)
        return standardised(total, batch.group), logs

    def match(self, x: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            advantage, logs = self.advantage(x, batch)
            field = self.views_at(x, batch, "score").field
        loss = self.options.field_weight * loss_with_gradient(x, field)
        for visit in self.policy(batch):
            said = self.student.predict(visit.x, visit.t, batch.cond)
            mean = mean_of_step(self.sampler(), said, visit, self.options.eta)
            loss = loss - (advantage * log_density(visit, mean)).mean() / x[0].numel()
        return loss, logs
