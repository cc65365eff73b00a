"""On-policy distillation: the student draws by itself, and teachers say at the states it meets where to go from there.

DiffusionOPD, 2026, 2605.15055; ``estimator: policy`` is that of Flow-OPD, 2026, 2605.08063.

- Rollout: the student's own K steps, whose states are kept without a graph. At each one the teacher of the sample's
  prompt says the mean of the same step; L_j = mean(d^2) / 2 with d = mean_student - sg mean_teacher, or, where the
  rollout adds noise (``eta``), mean(d^2) / (2 std^2) (eq. 12). Then the sum of the steps' losses over the student's
  rollouts is the KL divergence of its paths to the teacher's (per element).
- Several teachers (``teachers``, ``data.route``): each for its own prompts, with a guidance of its own
  (``guidance_of``); the student learns all of them.
- Few steps (ours): ``teacher_calls`` m > 1, where the teacher goes from the state to the student's next time in m DDIM
  steps and the target is the step that ends where those do; with ``renoise`` they go on to clean data, as the student's
  clean prediction is all that its next state keeps. The teacher's own grid for K and m = 1 is the paper's form.
- ``measured``: d in the next state as there, in the velocity, or in the clean sample, which weigh the steps otherwise.
- ``estimator: policy`` (Flow-OPD): no gradient of d, but a likelihood-ratio one, advantage times grad log p of the step
  that was made. Its advantage is here log p_teacher - log p_student of that very step (ours), clipped: in the mean its
  gradient is that of the exact form. The published one, minus the KL of the two Gaussians, does not depend on what was
  drawn, and its gradient is 0 in the mean.
- ``warm_start`` (ours): the same target at the states of pairs, whose next state is where the step leads; with
  ``renoise`` their end, as a step with fresh noise leads on from there.
- ``anchor_weight``: the same divergence to the recipe's own teacher on every prompt (Flow-OPD: 0.04).

Differs from the papers: the student is not guided and takes the guidance over; one update per rollout, so that the
ratio of policies is 1 and nothing clips it; all K steps are trained on, and prompts of several teachers share a batch.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from stepdistill.diffusion.path import Prediction
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.distances import distance
from stepdistill.losses.regression import WarmStartOptions, ends, steps, warm_start_rate
from stepdistill.losses.rollout import Visit, led_to, log_density, mean_of_step, squared, visits
from stepdistill.networks.roles import TEACHER
from stepdistill.networks.route import Route
from stepdistill.networks.sampler import Sampler


class OPD(Method):
    """See the module's text."""

    default_times = (1.0, 0.75, 0.5, 0.25)
    several_teachers = True

    class Options(WarmStartOptions):
        group: ClassVar[str] = "on-policy"

        guidance: float = 4.5  # of the teachers; the student takes it over
        guidance_of: dict[str, float] = Field(default_factory=dict)  # of a further teacher, by its name
        teacher_calls: PositiveInt = 4  # the teacher's steps for each of the student's; 1 in the papers
        eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of fresh noise in rollouts
        estimator: Literal["exact", "policy"] = "exact"  # the error's gradient, or that of a likelihood ratio
        advantage_clip: PositiveFloat = 5.0  # of the policy's advantage
        measured: Literal["state", "velocity", "x0"] = "state"  # in what a step's error is
        anchor_weight: Annotated[float, Field(ge=0)] = 0.0  # of the divergence to the recipe's own teacher
        renoise: bool = False  # fresh noise between the exported student's steps

    options: Options

    def setup(self) -> None:
        options, names = self.options, list(self.roles.route.teachers)
        if unknown := sorted(options.guidance_of.keys() - names):
            raise UserError(
                f"options.guidance_of names {unknown[0]}, which is none of the teachers ({', '.join(names)}): name "
                "it in teachers, or leave it out"
            )
        if options.estimator == "policy" and (not options.eta or options.measured != "state"):
            raise UserError(
                f"options.estimator is policy, options.eta {options.eta:g} and options.measured {options.measured}, "
                "but a likelihood needs steps with noise, as states: set eta, such as 0.7, and measured=state"
            )
        if options.anchor_weight and len(names) == 1:
            raise UserError(
                f"options.anchor_weight is {options.anchor_weight:g}, but there is one teacher, which is the anchor "
                "itself: set it to 0, or name further ones in teachers"
            )
        self.eta = options.eta or None  # None: as the sampler has it
        self.anchor = Route({TEACHER: self.teacher})
        self.guidance = {name: options.guidance_of.get(name, options.guidance) for name in names}

    @property
    def leaves_teacher(self) -> bool:
        return len(self.roles.route.teachers) > 1

    def lr_ratio(self, turn: Turn) -> float:
        return warm_start_rate(turn.step, self.options)

    def phase(self, step: int) -> str:
        return "warm start" if step < self.options.warm_start else "on-policy"

    def sampler(self) -> Sampler:
        return Sampler(self.times, self.options.renoise)

    @torch.no_grad()
    def target(self, visit: Visit, batch: Batch, route: Route) -> Prediction:
        """What the teachers of the batch's prompts would have the student say at a visited state."""

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return route.predict(x, t, batch.cond, batch.prompt, self.guidance)

        visit = visit.to_the_end() if self.options.renoise else visit
        return led_to(predict, visit, self.options.teacher_calls)

    def mean(self, said: Prediction, visit: Visit) -> Tensor:
        """The mean [B, ...] of the step that a prediction at a visited state leads to."""
        return mean_of_step(self.sampler(), said, visit, self.eta)

    def divergence(self, own: Prediction, other: Prediction, visit: Visit) -> Tensor:
        """That of the student's step to another at one state, per element, [B]."""
        if self.options.measured == "state":
            error = self.mean(own, visit) - self.mean(other, visit)
            variance = max(visit.std**2, 1e-8) if visit.std else 1.0
            return squared(error) / (2 * variance)
        in_x0 = self.options.measured == "x0"
        return squared(own.x0 - other.x0 if in_x0 else own.velocity - other.velocity) / 2

    def surrogate(self, own: Prediction, other: Prediction, visit: Visit) -> Tensor:
        """What has the policy's gradient towards the other step, [B]."""
        if not visit.std:  # the last step, to clean data, draws nothing
            return self.divergence(own, other, visit)
        density = log_density(visit, self.mean(own, visit))
        better = log_density(visit, self.mean(other, visit)) - density.detach()
        clip = self.options.advantage_clip
        return -(better / visit.x[0].numel()).clamp(-clip, clip) * density

    def loss(self, turn: Turn, batch: Batch) -> Loss:
        options = self.options
        if turn.step < options.warm_start:
            follow = ends if options.renoise else steps
            return Loss(distance(*follow(self.student, self.times, batch), options.pair_distance))
        compare = self.surrogate if options.estimator == "policy" else self.divergence
        total, apart = batch.noise.new_zeros(len(batch.noise)), list[Tensor]()
        for visit in visits(self.student, self.sampler(), batch, batch.cond, self.eta):
            own = self.student.predict(visit.x, visit.t, batch.cond)
            target = self.target(visit, batch, self.roles.route)
            total = total + compare(own, target, visit)
            apart.append(squared(own.x0.detach() - target.x0).mean())
            if options.anchor_weight:
                anchor = self.target(visit, batch, self.anchor)
                total = total + options.anchor_weight * compare(own, anchor, visit)
        return Loss(total.mean(), {"apart": torch.stack(apart).mean().sqrt()})
