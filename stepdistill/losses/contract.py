"""The contract of a method: whose turn a step is, what it minimises then, what it trains, and how it is sampled.

Nothing here knows a model or a paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, final

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor, nn

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.looks import Looks
from stepdistill.losses.rewards import Rewards
from stepdistill.networks.roles import Roles
from stepdistill.networks.teacher import Teacher

if TYPE_CHECKING:
    from stepdistill.networks.sampler import Sampler


NEEDS = ("noise", "prompts", "rich", "images", "pairs", "states", "reward", "group", "concept", "looks")
"""What a method can ask for: starting noise, prompts, their rich captions (``data.rich``), real images, (noise, teacher
sample) pairs, with the pairs the states of their trajectories at the method's ``pair_times``, the student's own by
default, the recipe's ``terms.reward``, several samples of each prompt beside each other (``train.group``), a word that
the text encoders learn (``roles.concept``), and what image networks see (``looks``)."""


@dataclass(frozen=True)
class Turn:
    """Whose update is made, and when.

    Attributes:
        network: the name in :meth:`Method.trained`.
        step: the method's own step, from 0. It is the method's clock: terms with turns of their own shift it against
            the step of the run, by which random numbers are drawn.
    """

    network: str
    step: int


@dataclass(frozen=True)
class Predicted:
    """Clean predictions of the student that its loss is of.

    Attributes:
        x0: [B, ...], with their graph; the loss reads them from this very tensor.
        t: the times [B] they were made at.
        prompt: which of the run's prompts each is of, [B] on the CPU; None where it is of none.
        others: clean samples [B, ...] of the same prompts, without a graph: what the loss compares them with.
    """

    x0: Tensor
    t: Tensor
    prompt: Tensor | None
    others: tuple[Tensor, ...] = ()

    def of_prompts(self) -> Tensor:
        """``prompt``.

        Raises:
            UserError: the predictions are of captions that the run's prompts do not hold.
        """
        if self.prompt is None:
            raise UserError(
                "terms.reward_of is prediction, but this method predicts images whose captions are not the run's "
                "prompts: give the same captions in data.prompts, or set options.source=pairs or terms.reward_of=sample"
            )
        return self.prompt


@dataclass(frozen=True)
class Loss:
    """What a method says of a batch.

    Attributes:
        value: a scalar, a mean over samples.
        logs: scalars to log.
        sample: the student's clean samples [B, ...] of the batch's own noise and conditions, with their graph, where
            the method made them as :meth:`Method.sample` does: terms then need no second rollout.
        predicted: the clean predictions that the loss is of, where it is of such.
    """

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    sample: Tensor | None = None
    predicted: Predicted | None = None


@dataclass(frozen=True)
class Trained:
    """What one optimiser updates.

    Attributes:
        role: whose weights, by its name in ``Method.roles``; None for none.
        extra: weights beside them that are no role's, such as a head.
        follows: whether it follows the student's samples: terms, ``train.lr_of`` and averages are not for it.
        of_data: of such a one, whether it learns data instead, so that nobody expects it to know those samples.
        features_only: whether features of the role are all that is read: what lies behind them gets no gradient.
        span: the calls of a drawing, from the first to before the second, that it makes; None for all of them, and for
            what makes none.
    """

    role: str | None = None
    extra: nn.Module | None = None
    follows: bool = False
    of_data: bool = False
    features_only: bool = False
    span: tuple[int, int] | None = None

    def parameters(self, roles: Roles) -> list[nn.Parameter]:
        """All of its weights."""
        own = [] if self.role is None else roles.parameters(self.role)
        return [*own, *([] if self.extra is None else self.extra.parameters())]

    def draws_the_end(self, calls: int) -> bool:
        """Whether it makes the last of a drawing's calls, which gives the clean sample."""
        return self.role is not None and not self.follows and (self.span is None or self.span[1] >= calls)


class MethodOptions(BaseModel):
    """Base of every method's options: frozen, and closed against keys it does not know.

    Class attributes:
        group: what kind of method has such options; lists of methods are sorted by it.

    Attributes:
        guidance: classifier-free guidance of the teacher that the student takes over; 1 is none.
        guidance_2: that of a teacher with a network for high noise and one for low, in the stretch of the second; None
            is the same. It stands for ``guidance`` alone: a scale of another name is the same in both.
        guidance_interval: times at which it is on (Kynkaanniemi et al. 2024, 2404.07724), also in cached pairs.
        guidance_rescale: phi of Lin et al. 2023, 2305.08891, eq. 16, also in cached pairs: 0.7 in the paper, for
            teachers with zero terminal SNR. Nothing to a network that takes its guidance as an input.
        shift: of a flow teacher's times, see shift.py; None takes that of its scheduler.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    group: ClassVar[str] = "other"

    guidance: float = 1.0
    guidance_2: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    shift: PositiveFloat | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the method asks of the data under these options, out of NEEDS: checked before anything loads."""
        return frozenset({"noise", "prompts"})

    @property
    def networks(self) -> dict[str, str]:
        """The feature networks (stepdistill/features/load.py) that the method's own loss looks through under these
        options, and the keys that say so: scores in their eyes are marked, and no run is ranked by them."""
        return {}

    @property
    def judged_from(self) -> int:
        """The method's step from which the student's samples tell how training goes: above 0 where they are not what is
        trained at first, as those of a network that starts from random weights."""
        return 0

    @property
    def score_scale(self) -> float:
        """The teacher's guidance where the student's samples meet it."""
        return self.guidance

    @property
    def score_interval(self) -> tuple[float, float]:
        """The times at which that is on."""
        return self.guidance_interval


class PairOptions(MethodOptions):
    """Options of a method that learns from pairs."""

    group: ClassVar[str] = "regression on pairs"

    pairs: int = 4096  # how many are cached
    pair_steps: int = 25  # network calls of the teacher per pair
    pair_solver: Literal["euler", "ddim", "heun", "dpm++2m"] = "dpm++2m"  # with which it makes them

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"pairs"}


class Method(nn.Module, ABC):
    """One algorithm. A subclass is one file in ``methods/``: its paper, its Options, and these functions.

    Class attributes:
        Options: the schema of ``options:`` in a recipe; a method narrows ``options`` to it.
        default_times: the student's times when the recipe gives none, descending from 1; a flow teacher's shift is
            applied to them where ``shifted_times``.
        starts_below: whether the student may be called first at a time below 1, there too with standard normal noise:
            its samples are matched as a distribution, and nothing ties its noise to a trajectory. See ``Sampler``.
        same_calls: whether all parts of a batch make the same calls of the networks, as sharded ones need.
        own_network: whether it gives the student a network of its own: turning the teacher's would be in vain.
        several_teachers: whether it learns from further teachers, each for its prompts (``roles.route``).
        without_few_steps: of a method whose teacher must denoise images at any time, which a student of few steps does
            not: what to do instead where the teacher is one, in a refusal; empty takes any.
        of_few_steps: whether its teacher is a student of few steps, which it goes on from, and makes no steps fewer.
        weak_teacher: whether a weaker version of the teacher may guide it (``roles.route.weak``).
        shows: what of ``Loss`` its student's turns tell beside the value, out of "sample" and "prediction": terms can
            read what they need there.

    Attributes:
        rewards: what the run's ``terms.reward`` says of clean samples, for a method that needs "reward"; set by who
            makes it for a run.
        looks: what the networks that its options name see in the run's samples, for a method that needs "looks"; there
            from :meth:`setup` on.
    """

    Options: ClassVar[type[MethodOptions]]
    default_times: ClassVar[tuple[float, ...]] = (1.0,)
    shifted_times: ClassVar[bool] = True
    starts_below: ClassVar[bool] = False
    same_calls: ClassVar[bool] = True
    own_network: ClassVar[bool] = False
    several_teachers: ClassVar[bool] = False
    weak_teacher: ClassVar[bool] = False
    without_few_steps: ClassVar[str] = ""
    of_few_steps: ClassVar[bool] = False
    shows: ClassVar[frozenset[str]] = frozenset()
    rewards: Rewards | None = None
    looks: Looks | None = None
    options: MethodOptions

    @final
    def __init__(
        self, roles: Roles, times: tuple[float, ...], options: MethodOptions, looks: Looks | None = None
    ) -> None:
        """A method at its start; what it adds is made in :meth:`setup`.

        Args:
            roles: the teacher, the student that starts as it, and what further networks are made of. They are no part
                of this module, whose own state is heads and buffers.
            times: where the student is called, descending from 1, or from below it with ``starts_below``.
            options: an instance of the class's Options.
            looks: for a method that needs them.
        """
        super().__init__()
        self.roles = roles
        self.student = roles.student
        self.times = times
        self.options = options
        self.looks = looks
        self.setup()

    @classmethod
    def usual_times(cls, steps: int | None = None) -> tuple[float, ...]:
        """The times of a student that draws in so many steps, where a recipe names none: ``default_times`` where that
        is their number, or none is asked for, and else evenly spaced ones from 1."""
        return cls.default_times if steps in (None, len(cls.default_times)) else uniform_times(steps or 1)

    @classmethod
    def shared_start(cls, options: MethodOptions) -> int:
        """How many of the first updates are the student's regression on pairs and nothing else, which runs of other
        methods can take over (stepdistill/training/warm_starts.py); 0 for none."""
        return 0

    def setup(self) -> None:
        """Makes what the method has beside the student: further roles, heads, buffers.

        Raises:
            UserError: options that do not go together, or not with the times.
        """
        return None

    @property
    def leaves_teacher(self) -> bool:
        """Whether the student is led to other samples than the teacher's, so that no watch should hold it to them: by
        a new word or captions that tell more, and by what a method says."""
        return not self.options.needs.isdisjoint({"concept", "rich"})

    @property
    def teacher(self) -> Teacher:
        """What is distilled."""
        return self.roles.teacher

    def trained(self) -> dict[str, Trained]:
        """What is trained, by name; each gets an optimiser of its own."""
        return {"student": Trained("student")}

    def pair_times(self) -> tuple[float, ...]:
        """Times inside (0, 1), descending, at which cached pairs keep states of their trajectories, where they are
        asked for."""
        return self.times[1:]

    def turn(self, step: int) -> Turn:
        """Whose update the method's step ``step`` (from 0) is."""
        return Turn("student", step)

    def phase(self, step: int) -> str:
        """What the stretch of training is called that the method's step ``step`` is in, for the curves of its page;
        empty where one stretch is as the next."""
        return ""

    def lr_ratio(self, turn: Turn) -> float:
        """The learning rate of the turn over that of ``train``."""
        return 1.0

    def betas(self, turn: Turn) -> tuple[float, float] | None:
        """AdamW's betas in the turn; None for those of ``train``."""
        return None

    @abstractmethod
    def loss(self, turn: Turn, batch: Batch) -> Loss:
        """The loss of the network whose turn it is."""

    def after_step(self, turn: Turn) -> None:
        """Called after the turn's update: targets, stages, phases. State lives in roles, buffers or modules."""
        return None

    def anew(self, turn: Turn) -> frozenset[str]:
        """What is trained, by name, whose optimiser starts anew after this turn, as it was given other weights there:
        moments of the old ones would pull the new ones along."""
        return frozenset()

    @abstractmethod
    def sampler(self) -> Sampler:
        """How the student is sampled; becomes the exported scheduler."""

    def sampler_at(self, step: int) -> Sampler:
        """How the student can be sampled after the method's step ``step``: as in the end, unless it is led there by way
        of other step counts. What a run's watch looks at."""
        return self.sampler()

    def sample(self, batch: Batch) -> Tensor:
        """The student's clean samples [B, ...] of the batch's noise and conditions; the last call alone has a graph."""
        return self.sampler().draw(self.student, batch.noise, batch.cond, batch.fresh)
