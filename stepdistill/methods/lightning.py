"""SDXL-Lightning: progressive distillation whose student is told from its teacher by a discriminator of jumps.

Lin, Wang and Yang 2024, "SDXL-Lightning: Progressive Adversarial Diffusion Distillation", 2402.13929.

A student without the capacity for its teacher's map blurs it under a squared error. Each stage of ``ratios`` has up to
three parts; then its student teaches the next one:

- Regression, ``regression_updates`` of each stage: |x_s of the student - x_s of the teacher's steps|^2. The paper's
  first stage is that alone, and has the guidance (``adversarial_from: 1``); its last one, of one step, begins so.
- Trajectory: D(x_t, x_s, t, s, c), a head on the features that one network d has of x_s and, next to them, of x_t, says
  whether the jump is the teacher's. L_D = softplus(-D(teacher)) + softplus(D(student)), L_G = softplus(-D(student)).
- Relaxed: D'(x_s, s, c) without x_t. Ends must be likely, each by itself, and no longer those of their starts: a
  student that cannot do the teacher's map is spared the odd pictures of a bad compromise.

d is a copy of the teacher, trained up to its middle; it and the head start anew with each part. Of clean ends (s = 0)
it would judge the texture, so that these are noised, both kinds alike, to one of ``noise_times``, all equally often, in
the relaxed part by ``noise_shares``. x_t at t = 1 is noise alone.

Differs: clean ends are noised at any step count (there at one), d starts anew in both parts (a reading), rates of the
regression fall to 0, and a LoRA's d is one (ours). Left out: merging a LoRA halfway, further times for students of one
or two steps, teachers from two stages back.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat

from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Trained, Turn
from stepdistill.losses.distances import rms
from stepdistill.losses.gan import discriminator_loss, generator_loss
from stepdistill.losses.jump_gan import JumpGan
from stepdistill.losses.progressive import ProgressiveMethod, ProgressiveOptions, Ratios
from stepdistill.losses.regression import annealed
from stepdistill.networks.roles import TEACHER

Kind = Literal["regression", "trajectory", "relaxed"]


class Part(NamedTuple):
    """A part of a stage: its first step, and how many it has, two for an update of a student against d."""

    stage: int
    kind: Kind
    first: int
    steps: int


class Lightning(ProgressiveMethod):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)

    class Options(ProgressiveOptions):
        group: ClassVar[str] = "adversarial"

        ratios: Ratios = (4, 4, 2)  # teacher's steps in one, by stage
        regression_updates: tuple[NonNegativeInt, ...] = ()  # of each stage; none of those not named
        trajectory_updates: NonNegativeInt = 1000  # of the student, in each stage
        relaxed_updates: NonNegativeInt = 1000  # of the student, in each stage; the last part goes on
        adversarial_from: NonNegativeInt = 0  # the first stage, from 0, with a discriminator
        regression_lr_ratio: PositiveFloat = 1.0  # learning rate of the regression over train.lr
        discriminator_lr_ratio: PositiveFloat = 1.0  # that of the discriminator
        # To which clean ends are noised before the discriminator sees them, before a flow teacher's shift.
        noise_times: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.01, 0.25, 0.5, 0.75)
        noise_shares: tuple[PositiveFloat, ...] = (5.0, 1.0, 1.0, 1.0)  # how often, in the relaxed part

    options: Options

    def setup(self) -> None:
        super().setup()
        self.course, eye = self.parts_in_turn(), self.roles.add("discriminator", restarts=True)
        self.gan = JumpGan(eye, self.options.noise_times, self.options.noise_shares)

    def parts_in_turn(self) -> list[Part]:
        """All parts of all stages."""
        options, stages, course, first = self.options, len(self.options.ratios), list[Part](), 0
        for stage, updates in enumerate((*options.regression_updates, *[0] * stages)[:stages]):
            against = (2 * options.trajectory_updates, 2 * options.relaxed_updates)
            lengths = (updates, *(against if stage >= options.adversarial_from else (0, 0)))
            for kind, steps in zip(get_args(Kind), lengths, strict=True):
                course += [Part(stage, kind, first, steps)] if steps else []
                first += steps
        idle = len({part.stage for part in course}) < stages
        if idle or course[-1].kind == "regression" or len(options.regression_updates) > stages:
            raise UserError(
                f"options.ratios has {stages} stages: each needs updates, the last one some with the discriminator: "
                f"set regression_updates (up to {stages}), trajectory_updates, relaxed_updates, adversarial_from"
            )
        return course

    def part(self, step: int) -> Part:
        """What the method's step is in."""
        return next(part for part in reversed(self.course) if part.first <= step)

    def stage(self, step: int) -> int:
        return self.part(step).stage

    def phase(self, step: int) -> str:
        return f"{super().phase(step)}, {self.part(step).kind}"

    def trained(self) -> dict[str, Trained]:
        critic = Trained("discriminator", self.gan, follows=True, features_only=True)
        return {**super().trained(), "discriminator": critic}

    def turn(self, step: int) -> Turn:
        part = self.part(step)
        critic = part.kind != "regression" and (step - part.first) % 2 == 0
        return Turn("discriminator" if critic else "student", step)

    def lr_ratio(self, turn: Turn) -> float:
        part, options = self.part(turn.step), self.options
        if part.kind == "regression":
            return options.regression_lr_ratio * annealed((turn.step - part.first) / part.steps)
        return options.discriminator_lr_ratio if turn.network == "discriminator" else 1.0

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        part, critic = self.part(turn.step), turn.network == "discriminator"
        jump, of_start = self.jump(batch, part.stage), part.kind == "trajectory"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not critic):
            made = self.student.predict(jump.start, jump.t, jump.cond).at(jump.s)  # [B, ...]
        if part.kind == "regression":
            error = made - self.taught(jump, part.stage)
            return Loss(error.square().mean(), {"residual": rms(error)})
        if critic:
            ends = [self.taught(jump, part.stage), made]
            real, seen = self.gan.logits(jump, ends, batch, of_start=of_start)
            loss = discriminator_loss(real, seen)
            return Loss(loss, {"discriminator": loss, "told_apart": (real - seen).mean()})
        loss = generator_loss(*self.gan.logits(jump, [made], batch, of_start=of_start))
        return Loss(loss, {"gan": loss})

    def anew(self, turn: Turn) -> frozenset[str]:
        following = self.part(turn.step + 1)
        against = following.first == turn.step + 1 and following.kind != "regression"
        return super().anew(turn) | ({"discriminator"} if against else set())

    def after_step(self, turn: Turn) -> None:
        super().after_step(turn)
        if "discriminator" in self.anew(turn):
            self.roles.become("discriminator", TEACHER)
            self.gan.restart()
