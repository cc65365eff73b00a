"""Phased DMD: experts for stretches of noise, each matched at the noise where its stretch ends, one after another.

Fan et al. 2025, "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
2510.27684.

- The K steps fall into ``phases``; phase k has an expert and ends at s = t_k, the last one at 0. Phases are trained in
  turn, from the samples of those before: an expert learns its stretch alone, and no expert a one-step jump to data.
- Student turn: the expert's state x_s = a rollout with Euler (DDIM) steps, the last from a random step of its phase
  straight to s, which alone has a graph; for t in (s, 1), reaching up to pure noise in every phase, and
  x_t = a x_s + c eps (see subinterval.py), a (score_fake - score_real) is the exact gradient of
  KL(student || teacher) at t in x_s: no normaliser, and with one phase and s = 0 Diff-Instruct's plain KL.
- Fake turn: the fake network sees x_s and never a clean sample: regression on the subinterval's target (eq. 11-13),
  with weight 1 / c^2, clamped. It starts from the teacher anew in each phase, and its optimiser from nothing.
- Experts are whole networks, or LoRA on one base; of a teacher with two (Wan 2.2) each starts as its phase's.

A phase takes ``warm_start + fake_warm_start + phase_updates (fake_updates + 1)`` updates, the last phase what is left
of ``train.updates``. Each expert is a network with an optimiser of its own, ``expert-1``, ..., ``student``: averaged
weights are those of the last, which learnt from the others' plain weights. Optional, and not in the paper: an expert's
first ``warm_start`` updates are a regression on cached pairs at its own times. Left out: a fake network for low noise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from pydantic import PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import per_sample
from stepdistill.diffusion.remembered import at_time
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Method, Trained, Turn
from stepdistill.losses.distances import mean_size
from stepdistill.losses.fake_score import (
    FakeLoss,
    FakeScoreOptions,
    exit_of,
    loss_with_gradient,
    sampler_of,
    turn_at,
    views_of,
)
from stepdistill.losses.regression import WarmStartOptions, regression, warm_start_rate
from stepdistill.losses.subinterval import subinterval_loss
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student


class PhasedDMD(Method):
    """See the module's text."""

    shows = frozenset({"sample"})
    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(FakeScoreOptions, WarmStartOptions):
        guidance: float = 4.0  # of the teacher
        fake_updates: int = 5  # updates of the fake network per update of an expert
        fake_loss: FakeLoss = "output"  # as eq. 13; the field is of scores, so it weighs alike
        phases: int = 2  # experts; 4 for 4 steps are slightly better and cost more
        phase_updates: PositiveInt = 30  # matching updates of each expert but the last; recipes say more
        clamp: float = 10.0  # greatest weight of the fake network's loss (eq. 13)
        renoise: bool | None = False  # the paper's steps are Euler steps

    options: Options

    def setup(self) -> None:
        own, times = self.options, self.times
        if not 1 <= own.phases <= len(times):
            raise UserError(
                f"options.phases is {own.phases}, but student.times has {len(times)}: a phase has one step or more"
            )
        edges = [round(k * len(times) / own.phases) for k in range(own.phases + 1)]
        self.spans = list(pairwise(edges))  # first call of each phase, and of the one after it
        self.names = [*(f"expert-{k + 1}" for k in range(own.phases - 1)), "student"]
        experts = [self.roles.add(name, "student") for name in self.names[:-1]]
        self.student = Student.of_phases([*experts, self.roles.student], [times[a:b] for a, b in self.spans])
        self.fake = self.roles.add("fake", restarts=True, rank=own.fake_lora_rank)

    def trained(self) -> dict[str, Trained]:
        experts = {name: Trained(name, span=span) for name, span in zip(self.names, self.spans, strict=True)}
        return {**experts, "fake": Trained("fake", follows=True)}

    def place(self, step: int) -> tuple[int, int]:
        """The phase that an update belongs to, and its number within the phase."""
        own = self.options
        length = own.warm_start + own.fake_warm_start + own.phase_updates * (own.fake_updates + 1)
        phase = min(step // length, own.phases - 1)
        return phase, step - phase * length

    def end(self, phase: int) -> float:
        """s, where the phase ends."""
        return (*self.times, 0.0)[self.spans[phase][1]]

    def turn(self, step: int) -> Turn:
        phase, inner = self.place(step)
        whose = turn_at(inner, self.options, self.options.warm_start)
        return Turn("fake" if whose == "fake" else self.names[phase], step)

    def phase(self, step: int) -> str:
        return f"{self.options.phase(self.place(step)[1], self.options.warm_start)} {self.place(step)[0] + 1}"

    def lr_ratio(self, turn: Turn) -> float:
        own = self.options
        return own.fake_lr_ratio if turn.network == "fake" else warm_start_rate(self.place(turn.step)[1], own)

    def after_step(self, turn: Turn) -> None:
        if self.anew(turn):
            self.roles.become("fake", "teacher")

    def anew(self, turn: Turn) -> frozenset[str]:
        return frozenset({"fake"} if self.place(turn.step + 1)[0] > self.place(turn.step)[0] else ())

    def sampler(self) -> Sampler:
        return sampler_of(self.student, self.times, self.options)

    def generate(self, batch: Batch, phase: int) -> Tensor:
        """States x_s [B, C, H, W] at the phase's end; only the jump there, from a random step, has a graph."""
        calls, sampler = exit_of(batch, *self.spans[phase]), self.sampler()
        with torch.no_grad():
            start = sampler.walk(self.student, batch.noise, batch.cond, batch.fresh, calls)
        jump = replace(sampler, times=(self.times[calls], self.end(phase)))
        return jump.walk(self.student, start, batch.cond, lambda call: batch.fresh(calls), 1)

    def sample(self, batch: Batch) -> Tensor:
        return self.generate(batch, self.options.phases - 1)

    def field(self, x_s: Tensor, batch: Batch, since: float) -> Tensor:
        """a (score_fake - score_real) at noised states x_s [B, C, H, W]: where to move away from, without a graph."""
        own = self.options
        views = views_of(self.fake, self.teacher, x_s, batch, own, own.score_scale, since=since)
        ratio, _ = self.fake.path.kernel(at_time(since, x_s), views.t)
        return per_sample(ratio, x_s) * (views.fake.score - views.real.score)

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options, (phase, inner) = self.options, self.place(turn.step)
        since = self.end(phase)
        if turn.network == "fake":
            with torch.no_grad():
                x_s = self.generate(batch, phase)
            loss = subinterval_loss(self.fake, x_s, since, batch, options.clamp, options.fake_loss)
            return Loss(loss, {"denoising": loss})
        if inner < options.warm_start:
            return Loss(regression(self.student, self.times, batch, options.pair_distance, self.spans[phase]))
        x_s = self.generate(batch, phase)
        field = self.field(x_s, batch, since)
        logs = {"field": mean_size(field), "x_std": x_s.detach().std()}
        return Loss(loss_with_gradient(x_s, field), logs, None if since else x_s)
