"""The contracts: what a batch, a teacher, a student and a method are. Nothing here knows a model or a paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor, nn

from stepdistill.losses.batch import Batch
from stepdistill.networks.teacher import Teacher

if TYPE_CHECKING:
    from stepdistill.networks.sampler import Sampler
    from stepdistill.networks.student import Student


NEEDS = ("noise", "prompts", "images", "pairs", "states")
"""What a method can ask of the data: starting noise, prompts, real images, (noise, teacher sample) pairs, and with the
pairs the states of their trajectories at the method's ``pair_times``, the student's own by default."""

DISCRIMINATOR = "discriminator"
FOLLOWERS = ("fake", DISCRIMINATOR)
"""Turns of networks that follow the student: neither terms nor ``train.lr_of`` are for them."""


class MethodOptions(BaseModel):
    """Base of every method's options: frozen, and closed against keys it does not know.

    Attributes:
        guidance: classifier-free guidance of the teacher that the student takes over; 1 is none.
        guidance_interval: times at which it is on (Kynkaanniemi et al. 2024, 2404.07724), also in cached pairs.
        guidance_rescale: phi of Lin et al. 2023, 2305.08891, eq. 16, also in cached pairs: 0.7 in the paper, for
            teachers with zero terminal SNR. Nothing to a network that takes its guidance as an input.
        shift: of a flow teacher's times, see shift.py; None takes that of its scheduler.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    shift: PositiveFloat | None = None


class Method(nn.Module, ABC):
    """One algorithm. A subclass is one file in ``methods/``: its paper, its Options, and these functions.

    Class attributes:
        Options: the schema of ``options:`` in a recipe.
        needs: what the method always asks of the data, out of NEEDS.
        default_times: the student's times when the recipe gives none, descending from 1; a flow teacher's shift is
            applied to them where ``shifted_times``.
        starts_below: whether the student may be called first at a time below 1, there too with standard normal noise:
            its samples are matched as a distribution, and nothing ties its noise to a trajectory. See ``Sampler``.
        own_network: whether it gives the student a network of its own: turning the teacher's would be in vain.
    """

    Options: ClassVar[type[MethodOptions]]
    needs: ClassVar[frozenset[str]] = frozenset({"noise", "prompts"})
    default_times: ClassVar[tuple[float, ...]] = (1.0,)
    shifted_times: ClassVar[bool] = True
    starts_below: ClassVar[bool] = False
    own_network: ClassVar[bool] = False

    @classmethod
    def needs_of(cls, options: MethodOptions) -> frozenset[str]:
        """What the method asks of the data under these options: checked before anything loads."""
        return cls.needs

    def __init__(
        self, teacher: Teacher, student: Student, times: tuple[float, ...], options: MethodOptions
    ) -> None:
        """A method at its start.

        Args:
            teacher: what is distilled.
            student: a copy of the teacher that is trained.
            times: where the student is called, descending from 1, or from below it with ``starts_below``.
            options: an instance of the class's Options.
        """
        super().__init__()
        self.student = student
        self.times = times
        # Held in a list so that nn.Module does not adopt the teacher: it is never trained, moved or saved with the run.
        self._teacher = [teacher]

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    def networks(self) -> dict[str, nn.Module]:
        """Networks that are trained, by name; each gets an optimiser of its own."""
        return {"student": self.student.net}

    def pair_times(self) -> tuple[float, ...]:
        """Times inside (0, 1), descending, at which cached pairs keep states of their trajectories, where they are
        asked for."""
        return self.times[1:]

    def lr_ratio(self, turn: str, step: int) -> float:
        """The learning rate over that of ``train`` for the network whose turn the step is."""
        return 1.0

    def turn(self, step: int) -> str:
        """Whose update the optimiser step ``step`` (from 0) is."""
        return "student"

    @abstractmethod
    def loss(self, turn: str, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the network whose turn it is, a scalar that is a mean over samples, and what to log."""

    def after_step(self, step: int) -> None:
        """Called after the optimiser step ``step``: targets, stages, phases. State lives in buffers or modules."""
        return None

    def anew(self, step: int) -> frozenset[str]:
        """Networks, by name, whose optimiser starts anew after the optimiser step ``step``, as they were given other
        weights there: moments of the old ones would pull the new ones along."""
        return frozenset()

    def span(self, turn: str) -> tuple[int, int] | None:
        """The calls of a drawing, from the first to before the second, that the network of this turn makes; None for
        all of them, and for a network that makes none."""
        return None

    @abstractmethod
    def sampler(self) -> Sampler:
        """How the student is sampled; becomes the exported scheduler."""


class PairOptions(MethodOptions):
    """Options of a method that learns from pairs."""

    pairs: int = 4096  # how many are cached
    pair_steps: int = 25  # network calls of the teacher per pair
    pair_solver: Literal["euler", "ddim", "heun", "dpm++2m"] = "dpm++2m"
