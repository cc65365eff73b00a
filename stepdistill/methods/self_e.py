"""Self-E: a student of clean predictions that learns from data, and from what a score says of its own predictions.

"Self-Evaluation Unlocks Any-Step Text-to-Image Generation", 2025, 2512.22374, as distillation: its evaluator, there
the network itself, is the frozen teacher, and its data are the teacher's samples or images.

- x0 = x_t - t V(x_t, t, s) is the student's clean prediction; s <= t is the end of its step, and how it is sampled.
- Data: |x0 - x|^2 to the clean sample x in x_t; nothing else where s = t.
- Evaluation: x0 is noised to x_s. x_self = sg[x0 + G(x_s, s, c) - G(x_s, s, no prompt)], G the evaluator's clean
  prediction: the classifier score, one part of the reverse KL's gradient.
- Target: (x + lambda x_self) / (1 + lambda), lambda = t / (1 - t) - s / (1 - s), and the length of x ("energy
  preserving", ``renorm``). Without that its fixed point is E[x | x_t] + lambda E[G(c) - G(no prompt)]: guidance
  inside a posterior mean, which gives no spread in one step, and nothing without prompts.
- Auxiliary, late in training: the other part, x_self += G(x_s, s, no prompt) - F(x_s, s), where F denoises the
  student's own predictions. The two together are DMD's field.

Start values and choices of ours: lambda's bound of 10; when the auxiliary term starts; F is the student's twin
(``losses/twin.py``) under the sample's prompt, where the paper gives it a prompt of its own; ``evaluation`` scales the
classifier score, so that at a teacher's guidance the sum is DMD's guided field. ``coupled`` puts the pair's own noise
into x_t, which makes the data term a reflow (Liu et al. 2022, 2209.03003); the paper's data have no noise of their own.
``warm_start`` is the data term alone, and F's. Left out: guidance while sampling, which the student has in its weights.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.diffusion.path import per_sample
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Loss, Turn
from stepdistill.losses.distances import distance, rms
from stepdistill.losses.flow_maps import PointOptions, TwoTimeMethod, teacher_prediction
from stepdistill.losses.twin import twin_prediction


class SelfE(TwoTimeMethod):
    """See the module's text."""

    class Options(PointOptions):
        same: float = 0.5  # share of samples with s = t: the data term alone
        to_data: float = 0.0  # share of samples whose jump ends in clean data
        noise_share: float = 0.0  # share of samples that start where every drawing starts
        coupled: bool = False  # noise of the data is that of its pair
        evaluation: float = 1.0  # of the classifier score
        largest_weight: Annotated[float, Field(ge=0)] = 10.0  # bound of lambda, which has none at t = 1
        renorm: bool = True  # gives the target the length of the data
        # Updates after the warm start from which on the auxiliary term acts; null: never. F learns from the start.
        auxiliary_after: Annotated[int, Field(ge=0)] | None = None
        auxiliary: float = 1.0  # of that term

        @property
        def needs(self) -> frozenset[str]:
            return super().needs - {"pairs", "states"} | ({self.source} - {"student"})

    options: Options

    def setup(self) -> None:
        super().setup()
        options = self.options
        if options.coupled and options.source != "pairs":
            raise UserError(
                f"options.coupled takes the noise of pairs, but options.source is {options.source}: set source=pairs, "
                "or coupled=false"
            )
        if not self.teacher.has_null and options.auxiliary_after is None:
            raise UserError(
                "self_e compares what the teacher says with a prompt and without, but this teacher has no "
                "unconditional mode: set options.auxiliary_after, from where on the student's own score is compared"
            )

    def pair_times(self) -> tuple[float, ...]:
        return ()

    def phase(self, step: int) -> str:
        if step < self.options.warm_start:
            return "warm start"
        return "evaluation, auxiliary" if self.compares(step) else "evaluation"

    def compares(self, step: int) -> bool:
        """Whether the auxiliary term acts at an update."""
        options = self.options
        return options.auxiliary_after is not None and step >= options.warm_start + options.auxiliary_after

    def weight(self, t: Tensor, s: Tensor) -> Tensor:
        """lambda [B] of steps from t to s <= t, 0 where they are one."""
        left = ((1 - t) * (1 - s)).clamp_min(1e-6)
        return ((t - s) / left).clamp_max(self.options.largest_weight)

    @torch.no_grad()
    def evaluated(self, x: Tensor, x_s: Tensor, s: Tensor, cond: Condition, step: int) -> Tensor:
        """x_self [B, ...] of the student's clean predictions x, noised to x_s at s [B]."""
        scale = (
            1.0 if self.teacher.denoiser.guidance is None else self.options.guidance
        )  # an input of the network
        strong = weak = teacher_prediction(self.teacher, x_s, s, cond, scale).x0
        if self.teacher.has_null:
            weak = teacher_prediction(self.teacher, x_s, s, cond, 0.0).x0
        x = x + self.options.evaluation * (strong - weak)
        if self.compares(step):
            x = x + self.options.auxiliary * (weak - twin_prediction(self.student, x_s, s, cond).x0)
        return x

    def target(self, data: Tensor, x_self: Tensor, weight: Tensor) -> Tensor:
        """What the student's clean prediction is to be, [B, ...]."""
        share = per_sample(weight / (1 + weight), data)
        mixed = torch.lerp(data, x_self, share)
        if not self.options.renorm:
            return mixed
        long, length = (x.flatten(1).norm(dim=1) for x in (data, mixed))
        return per_sample(long / length.clamp_min(1e-12), data) * mixed

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, draws = self.options, batch.draws
        eps = cast(Examples, batch.pairs).noise if options.coupled else None
        a, b = (draws.uniform(name, self.least, 1.0) for name in ("a", "b"))
        x_t, data, t, s, cond = self.points(batch, a, b, eps)
        x = x_t - per_sample(t, x_t) * self.student.flow_velocity(x_t, t, s, cond)
        warm, own, read = turn.step < options.warm_start, x.detach(), s.clamp_min(self.least)
        x_s = STRAIGHT.noised(own, draws.normal("self eps", tuple(x.shape[1:])), read)
        if warm:
            logs = {"data": distance(x, data, options.pair_distance)}
            loss = logs["data"]
        else:
            x_self, i = own.clone(), (s < t).nonzero()[:, 0]
            if len(i):
                x_self[i] = self.evaluated(own[i], x_s[i], read[i], cond.rows(i), turn.step)
            loss = (x - self.target(data, x_self, self.weight(t, s))).square().mean()
            logs = {"data": (own - data).square().mean(), "evaluation": rms(x_self - own)}
        if options.auxiliary_after is not None:
            logs["own"] = (twin_prediction(self.student, x_s, read, cond).x0 - own).square().mean()
            loss = loss + logs["own"]
        return Loss(loss, logs)
