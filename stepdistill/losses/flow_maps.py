"""What the flow-map methods share: the teacher on the straight path, a jump's times, the student and its warm start.

A flow map X(x, t, s) = x - (t - s) u(x, t, s) takes a point at time t to the time s of the same trajectory. All of it
is stated on the straight path, where u is a mean velocity and u(x, t, t) the velocity itself (Boffi et al. 2024,
2406.07507; Geng et al. 2025, 2505.13447); networks of other paths are read there, so their weights serve as they are.

A discrete table ends before pure noise: at t = 0.936 of the straight path for Stable Diffusion's. Beyond it a network
can only be read at its last point, where no flow map satisfies its equation, so no jump starts there; and a drawing
starts at the table's end from a standard normal state, as diffusers' schedulers do.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.diffusion.change_of_path import STRAIGHT, on_straight, predict_elsewhere
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Path, Prediction, TablePath, per_sample
from stepdistill.diffusion.polyline import Polyline
from stepdistill.diffusion.remembered import at_time, constant
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Method, Turn
from stepdistill.losses.distances import distance
from stepdistill.losses.map_equations import SHORTEST, MapEquations
from stepdistill.losses.regression import WarmStartOptions, warm_start_rate
from stepdistill.networks.derivative import STEP, Derivative, Way
from stepdistill.networks.sampler import Sampler, schedule_times
from stepdistill.networks.student import SecondTime
from stepdistill.networks.teacher import Teacher


@torch.no_grad()
def teacher_prediction(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor
) -> Prediction:
    """What the guided teacher says at (x_t [B, C, H, W], t [B]) of the straight path."""
    return predict_elsewhere(
        lambda x, own_t: teacher.predict(x, own_t, cond, guidance=guidance), teacher.path, STRAIGHT, x_t, t
    )


def teacher_velocity(
    teacher: Teacher, x_t: Tensor, t: Tensor, cond: Condition, guidance: float | Tensor
) -> Tensor:
    """The teacher's guided velocity [B, C, H, W] there."""
    return teacher_prediction(teacher, x_t, t, cond, guidance).velocity


def first_time(path: Path) -> float:
    """The straight time of a table's first timestep, below which no network was trained; 0 for other paths.

    It is a hundredth of a timestep later, as a derivative at the entry itself may be that of what lies below it.
    """
    if not isinstance(path, TablePath):
        return 0.0
    return float(STRAIGHT.time_of(path.angle(torch.tensor([1.01 / path.steps])))[0])


def logit_normal(draws: Draws, stream: str, mean: float, deviation: float) -> Tensor:
    """Times [B] in (0, 1) whose logit is normal."""
    return torch.sigmoid(mean + deviation * draws.normal(stream, ()))


def adaptive(error: Tensor, power: float, offset: float) -> Tensor:
    """The mean over samples of |error|^2 / sg(|error|^2 + offset)^power, |.|^2 summed over a sample's elements
    (2505.13447, eq. 22)."""
    size = error.flatten(1).square().sum(1)  # [B]
    return (size / (size.detach() + offset) ** power).mean()


def sizes(vectors: Tensor) -> Tensor:
    """The root mean square of each sample, [B], without a graph."""
    return vectors.detach().flatten(1).square().mean(1).sqrt()


class TwoTimeOptions(WarmStartOptions):
    """Options of a method whose student is told where its jumps end."""

    group: ClassVar[str] = "flow maps"

    # How the student is told where a jump ends: embedded, by new weights for t - s beside its timestep; or late_blocks,
    # without any, the network's late blocks hear s and the others t (Decoupled MeanFlow, 2510.24474); or stock, of Wan
    # 2.1, diffusers' AnyFlowTransformer3DModel, whose pipeline draws in any number of steps.
    second_time: SecondTime = "embedded"
    to_data: float = 0.25  # share of samples whose jump ends in clean data
    time_min: float = (
        0.01  # least time at which the teacher is read; at least that of a table's first timestep
    )


class WarmMapOptions(TwoTimeOptions):
    """Options of a method whose student may start by learning the jumps of pairs' trajectories."""

    # Of the warm start's jumps, beside the student's own; or all steps of the pairs' solver, and any time between them.
    warm_times: tuple[float, ...] | Literal["all"] = ()


class MapOptions(WarmMapOptions):
    """Options of a method that learns a flow map by a differential equation."""

    derivative: Way = "auto"  # exact, difference, or the first where it can be had
    # h of the differences, in units of [0, 1]: the length of the teacher's leg of Heun steps in them.
    derivative_step: Annotated[float, Field(ge=2 * SHORTEST, le=1)] = STEP


class PointOptions(TwoTimeOptions):
    """Options of a method that learns at noised clean latents."""

    source: Literal["pairs", "images", "student"] = (
        "pairs"  # where they come from; the student's own need no data
    )
    same: float = (
        0.25  # share of samples with s = t: plain velocity matching, which a teacher's copy starts with
    )
    noise_share: float = 0.25  # share of samples that start where every drawing starts

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({self.source} - {"student"})


class JumpOptions(PointOptions, MapOptions):
    """Options of a flow map that is learnt there by a differential equation."""

    # At p = 1 (MeanFlow) the gradient falls with the error: short jumps, whose target a teacher makes exact, outweigh
    # the long ones for good. At 1/2 every sample counts alike.
    power: float = 0.5  # p of the weight
    offset: float = 0.1  # c of the weight
    # Updates over which the derivative fades in, from the velocity that a teacher's copy has as u; null: 2000, or 0
    # after a warm start, whose end is nearer to u than the velocity is.
    tangent_warmup: int | None = None

    @property
    def fade(self) -> int:
        """``tangent_warmup``, where it was left open as it follows from ``warm_start``."""
        return self.tangent_warmup if self.tangent_warmup is not None else 0 if self.warm_start else 2000


class TwoTimeMethod(Method):
    """A method whose student is told where its jumps end, with a warm start on pairs.

    The warm start regresses u on the mean velocities between the states of the teacher's trajectories (consistency
    mid-training, Hu et al. 2025, 2509.24526), of which pairs keep those at the student's times and ``warm_times``. With
    ``all`` it knows the trajectories at every time. Jumps of no length learn the teacher's own velocity there: that of
    a solver's line is the teacher's at its start alone.

    Attributes:
        last: the straight time at which drawings start.
        least: the least straight time at which the teacher is read.
    """

    same_calls = False  # the teacher sees only the samples whose jumps ask for it
    shifted_times = False  # jumps of equal length, of which one constant tells, unless the recipe has others

    options: TwoTimeOptions

    def setup(self) -> None:
        student = self.student
        student.add_second_time(self.options.second_time)
        path, one = student.path, torch.ones(1)
        self.last = float(on_straight(path, one, one)[1][0])
        self.least = max(self.options.time_min, first_time(path))

    def pair_times(self) -> tuple[float, ...]:
        options = cast(WarmMapOptions, self.options)
        if options.warm_times == "all":
            return schedule_times(self.student.path, options.pair_steps)[1:]
        return tuple(sorted({*self.times[1:], *options.warm_times}, reverse=True))

    def phase(self, step: int) -> str:
        return "warm start" if step < self.options.warm_start else "flow map"

    def lr_ratio(self, turn: Turn) -> float:
        return warm_start_rate(turn.step, self.options)

    def sampler(self) -> Sampler:
        steps, any_steps = len(self.times), self.student.family.changes.draws_in_any_steps(self.student.net)
        counts = tuple(n for n in range(1, steps + 1) if steps % n == 0) if any_steps else None
        return Sampler(self.times, renoise=False, two_times=True, counts=counts)

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The velocity v(x, t) that the map is to have, [B, ...]."""
        return teacher_velocity(self.teacher, x, t, cond, self.options.guidance)

    def beginning(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Where drawings from ``noise`` [B, ...] start: the state and its time [B] on the straight path."""
        return on_straight(self.student.path, noise, at_time(1.0, noise))

    @torch.no_grad()
    def starts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's own states [B, ...] and their time [B] on the straight path, at one of ``times``."""
        calls = batch.draws.shared_integer("exit", len(self.times))
        x = self.sampler().walk(self.student, batch.noise, batch.cond, batch.fresh, calls)
        return on_straight(self.student.path, x, at_time(self.times[calls], x))

    def regression(self, batch: Batch) -> Tensor:
        """The distance of u to (x_t - x_s) / (t - s) for two points of a pair's trajectory at random; a scalar."""
        pairs = cast(Examples, batch.pairs)
        noise, path = cast(Tensor, pairs.noise), self.student.path
        between = [] if pairs.states is None else list(pairs.states.unbind(1))
        line = Polyline.of(
            torch.stack([noise, *between, pairs.x0], 1),
            constant([1.0, *self.pair_times(), 0.0], noise.device),
            lambda x, t: on_straight(path, x, t),
        )
        whole = cast(WarmMapOptions, self.options).warm_times == "all"
        t, s = self._any_times(batch.draws, line) if whole else self._states_times(batch.draws, line)
        x, gap = line.at(t), per_sample(t - s, noise)
        mean = (x - line.at(s)) / gap.clamp_min(SHORTEST)
        if len(i := (t - s <= SHORTEST).nonzero()[:, 0]):
            mean[i] = teacher_velocity(self.teacher, x[i], t[i], pairs.cond.rows(i), self.options.guidance)
        return distance(self.student.flow_velocity(x, t, s, pairs.cond), mean, self.options.pair_distance)

    def _states_times(self, draws: Draws, line: Polyline) -> tuple[Tensor, Tensor]:
        """Start and end [B] of the warm start's jumps on the straight path, among the times of the states; those of a
        method without jumps of its own choice start where the student's steps do."""
        last, options = len(line.times) - 1, self.options
        if isinstance(options, PointOptions):
            start = draws.integers("regression start", last)
            start = torch.where(draws.uniform("start") < options.noise_share, torch.zeros_like(start), start)
        else:
            known = (1.0, *self.pair_times())
            own = constant([known.index(time) for time in self.times], line.times.device).long()
            start = own[draws.integers("regression start", len(own))]
        end = start + 1 + (draws.uniform("regression end") * (last - start)).long()
        end = torch.where(draws.uniform("kind") < options.to_data, torch.full_like(end, last), end)
        return line.times[start], line.times[end]

    def _any_times(self, draws: Draws, line: Polyline) -> tuple[Tensor, Tensor]:
        """The same at any times of the line, and s = t on the share ``same``."""
        options, kind = self.options, draws.uniform("kind")
        same = options.same if isinstance(options, PointOptions) else 0.0
        if isinstance(options, PointOptions):
            t = line.times[0] * draws.uniform("regression start")
            t = torch.where(draws.uniform("start") < options.noise_share, line.times[0], t)
        else:
            own = constant(self.times, line.times.device)
            starts = on_straight(self.student.path, own, own)[1]
            t = starts[draws.integers("regression start", len(starts))]
        s = torch.where(kind < same + options.to_data, 0.0, t * draws.uniform("regression end"))
        read = t.clamp_min(self.least)
        return torch.where(kind < same, read, t), torch.where(kind < same, read, s)

    def jumps(self, draws: Draws, a: Tensor, b: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Start t <= last and end s <= t of each sample's jump from two times a and b, and which samples start where
        drawings do; each [B]."""
        options = cast(PointOptions, self.options)
        first = draws.uniform("start") < options.noise_share
        t = torch.where(first, last, torch.maximum(a, b).clamp_min(self.least).minimum(last))
        kind = draws.uniform("kind")
        s = torch.where(kind < options.same + options.to_data, torch.zeros_like(t), torch.minimum(a, b))
        return t, torch.where(kind < options.same, t, s.minimum(t)), first

    def points(
        self, batch: Batch, a: Tensor, b: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition]:
        """States x_t [B, ...], their clean latents, the start and the end of a jump from each, and the condition.

        Args:
            batch: with the latents.
            a, b: two times [B] for each.
            eps: the noise in them; None draws it.
        """
        options, draws = cast(PointOptions, self.options), batch.draws
        if options.source == "student":
            with torch.no_grad():
                x0 = self.sampler().draw(self.student, batch.noise, batch.cond, batch.fresh)
            cond = batch.cond
        else:
            source = cast(Examples, getattr(batch, options.source))
            x0, cond = source.x0, source.cond
        eps = draws.normal("eps", tuple(x0.shape[1:])) if eps is None else eps
        start, last = self.beginning(eps)
        t, s, first = self.jumps(draws, a, b, last)
        x_t = torch.where(per_sample(first, x0), start, STRAIGHT.noised(x0, eps, t))
        return x_t, x0, t, s, cond


class FlowMapMethod(TwoTimeMethod):
    """A method whose student is a flow map by a differential equation: with a derivative.

    Attributes:
        equations: what u is to be by each of them.
    """

    options: MapOptions

    def setup(self) -> None:
        super().setup()
        self.derivative = Derivative(self.options.derivative, self.options.derivative_step, self.last)
        self.equations = MapEquations(self.student, self.velocity, self.derivative, self.least)

    def share(self, step: int) -> float:
        """How much of the derivative counts at an update, in [0, 1]."""
        options = cast(JumpOptions, self.options)
        return min(1.0, (step - options.warm_start) / options.fade) if options.fade else 1.0

    def read_ends(self, draws: Draws, t: Tensor, s: Tensor) -> Tensor:
        """Ends [B] of jumps for the Lagrangian equation: of those that end in clean data half go to the least time at
        which the teacher is read, where the equation holds; the others are closed from there by its x0."""
        early = (s < self.least) & (draws.uniform("close") < 0.5)
        return torch.where(early, t.clamp_max(self.least), s)
