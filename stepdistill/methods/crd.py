"""CRD: a teacher learns what a reward likes by comparing its own samples of one prompt, without the reward's gradient.

"Centered Reward Distillation", 2026, 2603.14128. The equations are the paper's, its constants those of a public
implementation that cites it; which of them it changed was not checked.

- Samples x_1 .. x_G of one prompt (``train.group``), by an average of the student, in its own steps, unguided. A_i in
  [0, 1]: how much better the reward finds x_i than the others, in deviations, clipped to +-c, over 2 c, plus 1/2.
- Implicit reward of the noising: r_i = -(|v_i - v*|^2 / w - |v_old,i - v*|^2 / w_old) at one (t, eps), v* the velocity
  of (x_i, eps), w = sg mean|v_i - v*|: up to a factor log p / p_old. ``old`` is another average of the student.
- Loss: (beta (r_i - mean r) - (A_i - mean A))^2 c / beta, means over the group. With them the normaliser of
  p* = p_old exp(R / beta) / Z goes, which depends on the prompt alone; the loss is 0 where r is log p* / p_old.
- Beside it ``reference_weight`` (10^-3 + A_i (1 - 10^-3)) |v_i - v_ref|^2, where v_ref is the guided teacher's: good
  samples stay images, and guidance is taken over.
- Averages: old <- d old + (1 - d) student, d from 0.25 by 0.005 an update up to 0.999. That which draws is the student
  until update 75, then d rises by 0.0075 (our reading of "starts to move at 75").

|.|^2 is a mean. Differs from the paper: one update for each batch of samples, where it makes two; fewer noisings of
a sample; t is stratified, and shared by a group (ours); several rewards are standardised, then added (ours); centred
within the prompt, as derived, not over the batch, as the implementation does; ``reference_updates`` (ours) begins with
the reference alone. Left out: softmax weights in the place of the mean. The student is a teacher of many steps still.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Method, MethodOptions, Turn
from stepdistill.losses.groups import advantages, centred
from stepdistill.losses.rollout import squared
from stepdistill.networks.sampler import Sampler

NOISED_TO = (0.02, 0.98)  # as DMD's, before a flow teacher's time shift
LONGEST = 0.999  # decay of both averages
SLOWEST = 1e-3  # share of the reference that the worst sample keeps


def implicit_reward(v: Tensor, v_old: Tensor, target: Tensor) -> Tensor:
    """-(|v - v*|^2 / w - |v_old - v*|^2 / w_old) of velocities [B, ...], [B]."""

    def error(said: Tensor) -> Tensor:
        size = (said - target).detach().abs().flatten(1).mean(1)
        return squared(said - target) / (size + 1e-8)

    return error(v_old) - error(v)


def mismatch(implicit: Tensor, reward: Tensor, beta: float, group: int) -> Tensor:
    """(beta r - R)^2, both centred in their groups, [B]: 0 where r = log p / p_old of p = p_old exp(R / beta) / Z."""
    return (beta * centred(implicit, group) - centred(reward, group)).square()


class CRD(Method):
    """See the module's text."""

    default_times = uniform_times(10)
    without_few_steps = (
        "take the student's own teacher, and distil what comes out anew; or method gndmr, whose policy is the steps "
        "that a student of few makes"
    )

    class Options(MethodOptions):
        group: ClassVar[str] = "on-policy"

        guidance: float = 4.5  # of the reference; the student takes it over
        beta: PositiveFloat = 1.0  # of p_old exp(R / beta)
        advantage_clip: PositiveFloat = 5.0  # c, in deviations of a group's rewards
        noisings: PositiveInt = 4  # times at which a sample is noised; 20 in the paper. Each keeps its graph
        reference_weight: Annotated[float, Field(ge=0)] = 0.1  # of the distance to the guided teacher
        reference_updates: NonNegativeInt = 0  # first updates, by that alone
        old_decay: Annotated[float, Field(ge=0, lt=1)] = 0.25  # of the average that r compares with, at first
        old_rise: Annotated[float, Field(ge=0)] = 0.005  # at each update
        draws_itself: NonNegativeInt = 75  # updates in which the student itself draws
        draws_rise: Annotated[float, Field(ge=0)] = 0.0075  # then, of the decay of the average that does

        @property
        def needs(self) -> frozenset[str]:
            return super().needs | {"reward", "group"}

    options: Options

    def setup(self) -> None:
        self.old, self.drawing = (
            self.roles.add(name, "student", trained=False) for name in ("old", "drawing")
        )

    @property
    def leaves_teacher(self) -> bool:
        return True

    def phase(self, step: int) -> str:
        return "reference" if step < self.options.reference_updates else "reward"

    def sampler(self) -> Sampler:
        return Sampler(self.times, False)

    def decays(self, step: int) -> tuple[float, float]:
        """Those of the old and of the drawing average after the method's step."""
        options, n = self.options, step - self.options.reference_updates
        if n < 0:
            return 0.0, 0.0
        late = max(0, n - options.draws_itself)
        return min(LONGEST, options.old_decay + options.old_rise * n), min(LONGEST, options.draws_rise * late)

    @torch.no_grad()
    def judged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Samples [B, ...] of the batch, and what each reward gives them, [M, B]."""
        assert self.rewards is not None
        x = self.sampler().draw(self.drawing, batch.noise, batch.cond, batch.fresh)
        return x, self.rewards.scores(x, batch.prompt)

    def compared(self, x: Tensor, batch: Batch, call: int) -> tuple[Tensor, Tensor]:
        """The implicit reward of samples x [B, ...] at their noising ``call``, and the squared distance to the
        reference there, each [B]."""
        path, groups = self.student.path, batch.draws.of_groups(batch.group)
        width = (NOISED_TO[1] - NOISED_TO[0]) / self.options.noisings
        low = NOISED_TO[0] + call * width
        t = path.shifted(groups.uniform(f"noising t {call}", low, low + width)).repeat_interleave(batch.group)
        eps = batch.draws.normal(f"noising eps {call}", batch.shape)
        x_t, cond = path.noised(x, eps, t), batch.cond
        v = self.student.predict(x_t, t, cond).velocity
        with torch.no_grad():
            v_old = self.old.predict(x_t, t, cond).velocity
            v_ref = self.teacher.predict(x_t, t, cond, guidance=self.options.guidance).velocity
        return implicit_reward(v, v_old, path.target(x, eps, t, "velocity")), squared(v - v_ref)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, clip = self.options, self.options.advantage_clip
        x, scores = self.judged(batch)
        share = advantages(scores, batch.group).clamp(-clip, clip) / (2 * clip) + 0.5
        each = [self.compared(x, batch, call) for call in range(options.noisings)]
        away = torch.stack([distance for _, distance in each]).mean(0)
        logs = {"reward": scores.sum(0).mean(), "reference": away.mean()}
        if turn.step < options.reference_updates:
            return Loss(logs["reference"], logs)
        apart = torch.stack([mismatch(r, share, options.beta, batch.group) for r, _ in each]).mean(0)
        logs["mismatch"] = apart.mean()
        weight = options.reference_weight * (SLOWEST + (1 - SLOWEST) * share)
        return Loss((apart * clip / options.beta + weight * away).mean(), logs)

    def after_step(self, turn: Turn) -> None:
        for name, decay in zip(("old", "drawing"), self.decays(turn.step), strict=True):
            self.roles.average(name, "student", decay)
