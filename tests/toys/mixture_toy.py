"""What the test on the mixture needs: an exact teacher in 2-D, students, a short run as the loop's, and a measure."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from consistency_toy import PATH, Corrected
from flow_toy import Quick
from torch import Tensor, nn

from stepdistill.diffusion.draws import generator_for
from stepdistill.diffusion.solvers import trajectory, uniform_times
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Method, Turn
from stepdistill.methods import find_method
from stepdistill.networks.roles import Copies
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.testing.toys import (
    SHAPE,
    Mixture,
    Perceptron,
    ToyChanges,
    ToyFamily,
    ToyTeacher,
    loss_of,
    modules_of,
    toy_student,
)
from stepdistill.training.parallel import take_turn
from stepdistill.training.schedule import learning_rate

PAIRS, PAIR_STEPS = 4096, 24
SAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """How a method is trained here.

    Attributes:
        times: the student's steps.
        options: of the method, beside guidance 1: the teacher is unconditional.
        steps: optimiser updates of all its networks together, each on 64 samples.
        lr: learning rate at the start; it falls to 0 along a line.
    """

    times: tuple[float, ...] = (1.0,)
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 300
    lr: float = 5e-3


class CorrectedChanges(ToyChanges):
    """A smaller network has random weights."""

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        return Perceptron(width=int(64 * width), seed=1)


class CorrectedFamily(ToyFamily):
    """Corrected networks and their features."""

    changes = CorrectedChanges()

    def features_of(self, net: nn.Module) -> nn.Module:
        return net.get_submodule("correction.inner")


class Batched(Quick):
    """Integers of a batch from one generator, too."""

    def integers(self, stream: str, high: int) -> Tensor:
        return torch.randint(high, (self.count,), generator=self._one(stream))


def mixture_teacher() -> ToyTeacher:
    """The exact mixture of four modes as a velocity."""
    teacher = ToyTeacher(Corrected(), PATH, "velocity")  # type: ignore[no-untyped-call]
    teacher.denoiser.family = CorrectedFamily()
    return teacher


def build(name: str, setting: Setting, teacher: ToyTeacher | None = None) -> Method:
    """The method between a teacher, else the exact mixture as a velocity, and a student that starts as its copy."""
    kind, teacher = find_method(name), teacher or mixture_teacher()
    own = teacher.denoiser
    student = toy_student(copy.deepcopy(own.net), own.path, own.output)
    student.family = CorrectedFamily()
    options = kind.Options.model_validate({"guidance": 1.0, **setting.options})
    return kind(Copies(teacher, student), setting.times, options)


@cache
def trajectories() -> tuple[Tensor, ...]:
    """States [PAIRS, 2, 1, 1] of the teacher's trajectories from noise, at t = 1, 1 - 1 / PAIR_STEPS, ..., 0."""
    teacher, noise = mixture_teacher(), torch.randn(PAIRS, *SHAPE, generator=generator_for(1, "pairs"))
    grid = (*uniform_times(PAIR_STEPS), 0.0)
    return (noise, *trajectory(lambda x, t: teacher.predict(x, t, Condition()), noise, grid, "heun"))


@cache
def images() -> Tensor:
    """Exact samples [PAIRS, 2, 1, 1] of the mixture."""
    return Mixture(PATH).sample(PAIRS, generator_for(1, "images"))


def mixture_batch(method: Method, step: int, count: int, seed: int) -> Batch:
    """What a run hands to the method at a step: all that the method says it needs, and nothing else."""
    draws, needs = Batched(seed, step, 0, count), method.options.needs
    group = 8 if "group" in needs else 1
    batch = Batch(draws, SHAPE, Condition(), torch.zeros(draws.count), group=group)
    rows = draws.integers("rows", PAIRS)
    if "images" in needs:
        batch = replace(batch, images=Examples(images()[rows], Condition()))
    if "pairs" in needs:
        every = trajectories()
        at = [round((1 - t) * PAIR_STEPS) for t in method.pair_times()] if "states" in needs else []
        states = torch.stack([every[i][rows] for i in at], 1) if at else None
        batch = replace(batch, pairs=Examples(every[-1][rows], Condition(), every[0][rows], states))
    return batch


def train(method: Method, setting: Setting, *, sign: float = 1.0, seed: int = 0) -> None:
    """A run as the loop's: turns, rates, clipping, the method's own step; ``sign`` is that of the student's loss."""
    # Momentum of a student would carry it past the network that follows it: none, as is usual with adversaries.
    options = TrainOptions(
        updates=setting.steps, lr=setting.lr, schedule="linear", betas=(0.0, 0.99), seed=seed
    )
    trained = {k: [p for p in net.parameters() if p.requires_grad] for k, net in modules_of(method).items()}
    optimizers = {
        name: torch.optim.AdamW(
            parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
        )
        for name, parameters in trained.items()
    }
    for step in range(options.updates):
        turn = method.turn(step).network
        take_turn(trained, turn)
        loss, _ = loss_of(method, turn, mixture_batch(method, step, options.batch, options.seed))
        (sign * loss if turn == "student" else loss).backward()
        torch.nn.utils.clip_grad_norm_(trained[turn], options.clip)
        for group in optimizers[turn].param_groups:
            group["lr"] = learning_rate(options, step) * method.lr_ratio(Turn(turn, step))
        optimizers[turn].step()
        optimizers[turn].zero_grad(set_to_none=True)
        method.after_step(method.turn(step))
        for name in method.anew(method.turn(step)):
            optimizers[name].state.clear()


def energy_distance(a: Tensor) -> float:
    """sqrt(2 E|a - b| - E|a - a'| - E|b - b'|) between samples a [SAMPLES, 2, 1, 1] and as many exact ones b of the
    mixture. The square is estimated without bias, so it is 0 in the mean where the laws are one; below 0 it counts as
    0."""
    a, b = a.flatten(1), Mixture(PATH).sample(SAMPLES, generator_for(2, "exact")).flatten(1)
    pairs = SAMPLES * (SAMPLES - 1)  # a sample and itself are no pair
    within = (torch.cdist(a, a).sum() + torch.cdist(b, b).sum()) / pairs
    return float((2 * torch.cdist(a, b).mean() - within).clamp_min(0).sqrt())


@torch.no_grad()
def distance(method: Method) -> float:
    """The energy distance of what the student draws, by the method's own sampler, to the mixture."""

    def normal(stream: str) -> Tensor:
        return torch.randn(SAMPLES, *SHAPE, generator=generator_for(2, stream))

    draw = method.sampler().draw
    return energy_distance(
        draw(method.student, normal("noise"), Condition(), lambda call: normal(f"fresh {call}"))
    )
