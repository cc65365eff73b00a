"""What a method costs in network passes, counted between two perceptrons, in which a pass takes next to nothing."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import FlowPath, Path, Prediction
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import Method, MethodOptions
from stepdistill.networks.passes import WITH, WITHOUT, Passes
from stepdistill.networks.roles import Copies
from stepdistill.testing.contract import batch_for, equipped
from stepdistill.testing.toys import Perceptron, ToyChanges, ToyFamily, ToyTeacher, toy_student
from stepdistill.training.parallel import take_turn

SAMPLES = 4
TRIED = 12
"""Updates of a network in one stretch of training that are counted: a rollout's length is drawn."""


class AnyChanges(ToyChanges):
    """A network of another size counts as one of this."""

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        return Perceptron(seed=1)


class AnyFamily(ToyFamily):
    changes = AnyChanges()


class Guided(ToyTeacher):
    """A teacher whose guidance is a further pass, as a real one's is; at a scale of 1 there is none."""

    def __init__(self, path: Path) -> None:
        super().__init__(Perceptron(seed=0), path, "v", unguided=Perceptron(seed=2))
        self.denoiser.family = AnyFamily(path)

    def predict_with_input_gradient(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        if isinstance(guidance, float) and guidance == 1.0:
            return self.path.read(self.denoiser.raw(x_t, t, cond), "v", x_t, t)
        assert self.unguided is not None
        self.unguided.counter, self.unguided.who = self.denoiser.counter, self.denoiser.who
        return super().predict_with_input_gradient(x_t, t, cond, guidance=guidance)


def passes_of_training(
    kind: type[Method],
    options: MethodOptions,
    times: Sequence[float],
    updates: int,
    batch: int = 1,
    path: Path | None = None,
) -> Passes:
    """Network passes of so many updates, without those of pairs: each network's in each stretch of training is tried a
    few times, and the mean taken for all.

    Args:
        kind, options, times: of the method.
        updates: of all networks together.
        batch: samples of each.
        path: the teacher's.
    """
    path = path or FlowPath()
    student = toy_student(Perceptron(seed=1), path, "v")
    student.family = AnyFamily(path)
    method = equipped(kind, Copies(Guided(path), student), tuple(times), options)
    steps: dict[tuple[str, str], list[int]] = defaultdict(list)
    for step in range(updates):
        steps[method.turn(step).network, method.phase(step)].append(step)
    trained = {name: one.parameters(method.roles) for name, one in method.trained().items()}
    found = Passes()
    for (network, _), own in steps.items():
        seen, chosen = Passes(), own[:: max(1, len(own) // TRIED)][:TRIED]
        take_turn(trained, network)
        with (
            torch.enable_grad(),
            redirect_stderr(io.StringIO()),
        ):  # a first derivative is checked, and says so
            for step in (own[0], own[-1]):
                method.loss(method.turn(step), batch_for(method, SAMPLES, step))
            with method.roles.counter.counting(seen):
                for step in chosen:
                    method.loss(method.turn(step), batch_for(method, SAMPLES, step))
        for who, made in seen.by_network.items():
            for key in (WITH, WITHOUT):
                each = made[key] / (SAMPLES * len(chosen))
                found.count(who, round(each * batch * len(own)), graph=key == WITH)
    return found
