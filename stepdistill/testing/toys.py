"""Closed-form teachers and students: Gaussians and mixtures, as networks with the contracts of the real ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.guidance import extrapolate
from stepdistill.diffusion.path import Output, Path, Prediction, TablePath, per_sample
from stepdistill.families.base import Family
from stepdistill.families.condition import Condition
from stepdistill.families.network_changes import NetworkChanges, of_one_length
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Method, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.student import Student

SHAPE = (2, 1, 1)


class ToyChanges(NetworkChanges):
    def second_time(self, net: nn.Module) -> nn.Module:
        return net if self.has_second_time(net) else TwoTimes(net)

    def late_blocks(self, net: nn.Module) -> nn.Module:
        return self.second_time(net)  # a toy has no blocks

    def has_second_time(self, net: nn.Module) -> bool:
        return isinstance(net, TwoTimes | GaussianFlowMap)

    def fold_second_time(self, net: nn.Module, gap: float | None, call: Callable[[], object]) -> nn.Module:
        return AtGap(net, of_one_length(gap, net))


class ToyFamily(Family):
    """Networks called as net(x [B, C, 1, 1], t [B]) with our own time, and no pipeline.

    Args:
        path: of the networks; on a table they have the timesteps of real ones.
    """

    name = "toy"
    pipelines = ()
    lora_targets = ()
    changes = ToyChanges()

    def __init__(self, path: Path | None = None) -> None:
        self.steps = path.steps if isinstance(path, TablePath) else 0

    def state_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        return SHAPE

    def time(self, path: Path, t: Tensor) -> Tensor:
        return super().time(path, t) if self.steps else t

    def call(self, net: nn.Module, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        t = (time + 1) / self.steps if self.steps else time
        if (moved := cond.get("moved")) is not None:  # a condition [B, 2] that every network reads
            x_t = x_t + moved.view_as(x_t)
        return net(x_t, t, cond)  # type: ignore[no-any-return]

    def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
        return Condition()

    def null(self, pipe: Any, size: Size) -> Condition | None:
        return None

    def features_of(self, net: nn.Module) -> nn.Module:
        return net.get_submodule("inner")

    def feature_shape(self, net: nn.Module, state: tuple[int, ...]) -> tuple[int, int, int]:
        return 32, 1, 1


class Gaussian(nn.Module):
    """The exact denoiser of N(mean + shift * cond, deviation^2 I): x0 = mu + alpha s^2 (x - alpha mu) / V."""

    def __init__(self, path: Path, mean: float, deviation: float, shift: float = 0.0) -> None:
        super().__init__()
        self.path, self.shift = path, shift
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def mu(self, cond: Condition, x: Tensor) -> Tensor:
        label = cond.tensors.get("label")
        return self.mean + (per_sample(label, x) * self.shift if label is not None else 0.0)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = (per_sample(value, x) for value in self.path.alpha_sigma(t))
        variance = (alpha * self.deviation).square() + sigma.square()
        mu = self.mu(cond, x)
        return mu + alpha * self.deviation.square() * (x - alpha * mu) / variance


class GaussianMap(Gaussian):
    """The exact consistency function of that Gaussian: f(x, t) = mu + s (x - alpha mu) / sqrt(V)."""

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = (per_sample(value, x) for value in self.path.alpha_sigma(t))
        deviation = ((alpha * self.deviation).square() + sigma.square()).sqrt()
        mu = self.mu(cond, x)
        return mu + self.deviation * (x - alpha * mu) / deviation


class Affine(nn.Module):
    """A generator x0 = shift + scale * x_t, whatever t is."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.shift + self.scale * x


class Mixture(nn.Module):
    """The exact denoiser of equal Gaussians of one deviation at the corners of a square, and a fit for a network."""

    def __init__(self, path: Path, radius: float = 1.0, deviation: float = 0.15, modes: int = 4) -> None:
        super().__init__()
        angles = torch.arange(modes) * (2 * math.pi / modes)
        self.register_buffer("centres", radius * torch.stack([torch.cos(angles), torch.sin(angles)], 1))
        self.path, self.deviation = path, deviation

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = (value[:, None, None] for value in self.path.alpha_sigma(t))
        points, centres = x.flatten(1)[:, None], self.centres[None]  # type: ignore[index]
        variance = (alpha * self.deviation).square() + sigma.square()
        weight = (-(points - alpha * centres).square().sum(2, keepdim=True) / (2 * variance)).softmax(1)
        each = centres + alpha * self.deviation**2 * (points - alpha * centres) / variance
        return (weight * each).sum(1).view_as(x)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws [count, 2, 1, 1]."""
        which = torch.randint(len(self.centres), (count,), generator=generator)  # type: ignore[arg-type]
        noise = torch.randn(count, 2, generator=generator) * self.deviation
        return (self.centres[which] + noise)[..., None, None]  # type: ignore[index]


class Perceptron(nn.Module):
    """A small network of (x, t) with an inner layer for a discriminator to read."""

    def __init__(self, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(2 + 8, width)
        self.second = nn.Linear(width, width)
        self.inner = nn.Conv2d(width, 32, 1)
        self.last = nn.Linear(32, 2)
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter[0].numel() if parameter.ndim > 1 else 64)
            parameter.data.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        phase = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0]) * math.pi
        h = torch.cat([x.flatten(1), phase.sin(), phase.cos()], 1)
        h = torch.nn.functional.silu(self.second(torch.nn.functional.silu(self.first(h))))
        h = torch.nn.functional.silu(self.inner(h[..., None, None]))
        return self.last(h.flatten(1))[..., None, None]  # type: ignore[no-any-return]


class ToyCodec:
    """States of SHAPE, and no condition for any prompt."""

    shape = SHAPE

    def encode(self, prompts: list[str]) -> Condition:
        return Condition()

    def by_frame(self, states: Tensor) -> None:
        return None


class ToyTeacher:
    """A closed-form network with PipelineTeacher's contract."""

    codec = ToyCodec()
    device = torch.device("cpu")
    has_null = True  # of one network: what it says without a condition is the same

    def __init__(
        self, net: nn.Module, path: Path, output: Output = "x0", unguided: nn.Module | None = None
    ) -> None:
        family = ToyFamily(path)
        self.denoiser = Denoiser(net.requires_grad_(False), path, output, family)
        self.unguided: Denoiser | None = None
        if unguided is not None:
            self.unguided = Denoiser(unguided.requires_grad_(False), path, output, family)

    @property
    def start(self) -> Denoiser:
        return self.denoiser

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @torch.no_grad()
    def predict(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        return self.predict_with_input_gradient(x_t, t, cond, guidance=guidance)

    def predict_with_input_gradient(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, guidance: float | Tensor = 1.0
    ) -> Prediction:
        out = self.denoiser.raw(x_t, t, cond)
        if self.unguided is not None:
            out = extrapolate(self.unguided.raw(x_t, t, cond), out, guidance)
        return self.path.read(out, self.denoiser.output, x_t, t)


def toy_student(net: nn.Module, path: Path, output: Output = "x0") -> Student:
    """A student around any network."""
    return Student(net.requires_grad_(True), path, output, ToyFamily(path))


def loss_of(method: Method, network: str | Turn, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """What a network's turn at the step of the batch comes to, and what it logs."""
    turn = network if isinstance(network, Turn) else Turn(network, batch.draws.step)
    found = method.loss(turn, batch)
    return found.value, found.logs


def modules_of(method: Method) -> dict[str, nn.Module]:
    """What each optimiser of a method updates."""
    found: dict[str, nn.Module] = {}
    for name, one in method.trained().items():
        net = method.roles[one.role].net if one.role else None
        parts = [part for part in (net, one.extra) if part is not None]
        found[name] = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
    return found


def weights_of(method: Method) -> list[nn.Parameter]:
    """All that a method has: its student's, its other roles', its own."""
    roles = method.roles
    student = [p for each in method.student.experts or (method.student,) for p in each.net.parameters()]
    others = [p for name in roles.names for p in roles.parameters(name)]
    return list({id(p): p for p in (*student, *others, *method.parameters())}.values())


def clear(method: Method) -> None:
    """Takes all gradients away."""
    for value in weights_of(method):
        value.grad = None


def toy_batch(
    count: int, step: int = 0, seed: int = 0, pairs: Any = None, images: Tensor | None = None
) -> Batch:
    """A batch of ``count``; ``pairs`` maps noise [B, 2, 1, 1] to the teacher's sample of it."""
    draws = Draws(seed, step, 0, count)
    z = draws.normal("pair", SHAPE)
    return Batch(
        draws,
        SHAPE,
        Condition(),
        torch.arange(count),
        images=None if images is None else Examples(images, Condition(), number=torch.arange(count) % 2),
        pairs=None if pairs is None else Examples(pairs(z), Condition(), z),
        rich=Condition(),
    )


class TwoTimes(nn.Module):
    """A copy of a network with what t - s changes added to its output; nothing at the start."""

    def __init__(self, net: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(2 + 8 + 4, width), nn.Linear(width, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        gap = cond.tensors["gap"] if "gap" in cond.tensors else torch.zeros_like(t)
        rates = math.pi * torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=t.dtype)
        phase, length = t[:, None] * rates, gap[:, None] * rates[:2]
        h = torch.cat([x.flatten(1), phase.sin(), phase.cos(), length.sin(), length.cos()], 1)
        added = self.last(torch.nn.functional.silu(self.first(h)))
        return self.net(x, t, cond) + added[..., None, None]  # type: ignore[no-any-return]


class AtGap(nn.Module):
    """A network with two times at one t - s."""

    def __init__(self, net: nn.Module, gap: float) -> None:
        super().__init__()
        self.net, self.gap = net, gap

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.net(x, t, cond.with_tensor("gap", torch.full_like(t, self.gap)))  # type: ignore[no-any-return]


class GaussianFlowMap(nn.Module):
    """The exact mean velocity u(x, t, s) of N(mean, deviation^2 I) on the straight path, as a network with two times.

    With S_t^2 = (1 - t)^2 c^2 + t^2 and X = (1 - s) mu + (S_s / S_t) (x - (1 - t) mu), u = (X - x) / (s - t) without
    its removable pole: u = -mu + ((1 + c^2) (s + t) - 2 c^2) / ((S_s + S_t) S_t) (x - (1 - t) mu).
    """

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        gap = cond.tensors["gap"] if "gap" in cond.tensors else torch.zeros_like(t)
        c2, s = self.deviation.square(), t - gap
        at_t, at_s = (((1 - time).square() * c2 + time.square()).sqrt() for time in (t, s))
        slope = ((1 + c2) * (s + t) - 2 * c2) / ((at_s + at_t) * at_t)
        return -self.mean + per_sample(slope, x) * (x - per_sample(1 - t, x) * self.mean)
