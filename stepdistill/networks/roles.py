"""Who is who: the teacher, the student and every network that starts as one of them, and on which weights each lies.

- ``Copies``: a role is a float32 network of its own. What trains all weights needs that.
- ``Adapters``: there is one frozen network, the teacher's, as the teacher holds it; a role is a LoRA adapter on it, and
  the teacher is the network with none. A student, the fake network that follows it and a target cost three adapters
  beside the one network, and no more of it than its activations (DMD2-LoRA and Hyper-SD train so: Yin et al. 2024,
  2405.14867; Ren et al. 2024, 2404.13686).
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from stepdistill.diffusion.path import Output
from stepdistill.errors import UserError, did_you_mean
from stepdistill.networks.averages import follow
from stepdistill.networks.checkpointing import checkpointed
from stepdistill.networks.concept import Concept
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import Adapter, SharedNetwork
from stepdistill.networks.route import Route
from stepdistill.networks.sharding import held_like, load_whole
from stepdistill.networks.student import Student
from stepdistill.networks.switched import networks_in
from stepdistill.networks.teacher import PipelineTeacher, Teacher

STUDENT, TEACHER = "student", "teacher"


class Roles(ABC):
    """The teacher, and the networks that start as it or as one another, by name.

    Attributes:
        teacher: what is distilled; no role.
        student: the role "student".
        counter: told of every call of their networks.
        route: the teacher, and further frozen ones with the prompts that are theirs; the teacher alone at the start.
        concept: the word that the run's text encoders learn; None where they learn none.
        turned: whether the student's start was made of the teacher's by training, to say another output.
    """

    concept: Concept | None = None
    turned = False

    def __init__(self, teacher: Teacher, student: Student) -> None:
        self.teacher, self.student = teacher, student
        self.route = Route({TEACHER: teacher})
        self._denoisers: dict[str, Denoiser] = {STUDENT: student}
        self.counter = teacher.denoiser.counter
        named = ((TEACHER, teacher.denoiser), (TEACHER, teacher.start), (STUDENT, student))
        for name, each in named:
            each.counter, each.who = self.counter, name

    def __getitem__(self, name: str) -> Denoiser:
        """A role's network."""
        return self._denoisers[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The roles, the student first, then in the order in which they were added."""
        return tuple(self._denoisers)

    def add(
        self,
        name: str,
        source: str = TEACHER,
        *,
        trained: bool = True,
        restarts: bool = False,
        rank: int | None = None,
        frozen_alike: bool = False,
    ) -> Denoiser:
        """A new role.

        Args:
            name: its name, without a dot.
            source: what it starts as: the teacher, in the output that a student starts with, or another role.
            trained: whether gradients reach it.
            restarts: whether it will :meth:`become` the teacher again.
            rank: of its adapter; None takes that of ``source``, the student's for the teacher.
            frozen_alike: whether what the recipe freezes of the student stays as it is in this network, too.

        Raises:
            UserError: for a rank where there are no adapters, or one that its start has not.
        """
        if name in (*self._denoisers, TEACHER):
            raise ValueError(f"there is a role {name!r} already")
        self._denoisers[name] = made = self._made(name, source, trained, restarts, rank)
        made.counter, made.who = self.counter, name
        if frozen_alike:
            self._freeze_alike(name)
        return made

    def _freeze_alike(self, name: str) -> None:
        """Freezes in a role what is frozen in the student."""
        return None

    @abstractmethod
    def _made(self, name: str, source: str, trained: bool, restarts: bool, rank: int | None) -> Denoiser:
        """What :meth:`add` adds."""

    @abstractmethod
    def become(self, name: str, source: str) -> None:
        """Gives a role the weights of another one, or those it started with as the teacher."""

    def average(self, name: str, of: str, decay: float) -> None:
        """name <- decay name + (1 - decay) of."""
        own, theirs = self.weights(name), self.weights(of)  # of what is frozen there is nothing to follow
        follow([own[key] for key in theirs], list(theirs.values()), decay)

    @abstractmethod
    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """What of a role is trained, or would be, by name; nothing that it shares."""

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The same without names."""
        return list(self.weights(name).values())

    @abstractmethod
    def stored(self) -> dict[str, nn.Module]:
        """What lies in memory: networks, each once."""

    def hold_alone(self) -> None:
        """Before they are shared out among processes: no network beside :meth:`stored` keeps a tensor of them whole,
        where the teacher's pipeline is nobody else's."""
        return None

    @abstractmethod
    def checkpointed(self) -> AbstractContextManager[None]:
        """Inside the ``with`` every network, the teacher's too, keeps no more than the inputs of its blocks for a
        backward pass, see ``checkpointing.py``.

        Raises:
            UserError: for a network that cannot.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that the roles are, beside the teacher; a role's tensors after its name and a dot."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state`."""


class Copies(Roles):
    """A role is a network of its own in float32.

    Args:
        teacher: what is distilled.
        student: a network that starts as the teacher; None makes one.
    """

    def __init__(self, teacher: Teacher, student: Student | None = None) -> None:
        super().__init__(teacher, student or Student.from_teacher(teacher))
        self._fresh: dict[str, dict[str, Tensor]] = {}
        self._frozen: re.Pattern[str] | None = None
        self._frozen_in = {STUDENT}

    def freeze(self, wanted: Sequence[str]) -> float:
        """Keeps a part of the student's network as it is: no gradient, no optimiser.

        Args:
            wanted: parts of names of its parameters, or levels of its family's ``freezable``.

        Returns:
            the share of its numbers that stay.

        Raises:
            UserError: one of them names no parameter, or together they leave none to be trained.
        """
        net, levels = self.student.net, self.student.family.freezable
        names = [name for name, _ in net.named_parameters()]
        patterns = [levels.get(each) or re.escape(each) for each in wanted]
        for each, pattern in zip(wanted, patterns, strict=True):
            if not any(re.search(pattern, name) for name in names):
                parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
                near = did_you_mean(each, {*parts, *levels})
                raise UserError(f"student.freeze has {each}, which is in no name of a parameter {near}")
        self._frozen = re.compile("|".join(patterns))
        kept = self.weights(STUDENT)
        if not kept:
            raise UserError(
                f"student.freeze is {list(wanted)}, which leaves nothing to train: take out a part of it"
            )
        self._freeze_alike(STUDENT)
        return 1 - sum(v.numel() for v in kept.values()) / sum(v.numel() for v in net.parameters())

    def _freeze_alike(self, name: str) -> None:
        self._frozen_in.add(name)
        kept = self.weights(name)
        for key, value in self[name].net.named_parameters():
            value.requires_grad_(key in kept)

    def _made(self, name: str, source: str, trained: bool, restarts: bool, rank: int | None) -> Denoiser:
        if rank is not None:
            raise UserError(
                f"an adapter of rank {rank} for the {name} network needs a student that is one: set "
                "student.lora_rank, or leave that rank out"
            )
        made = (self.teacher.start if source == TEACHER else self[source]).copy()
        made.net.to(next(self.student.net.parameters()).device).requires_grad_(trained)
        if restarts:  # the teacher itself may be rounded to the run's precision later
            kept = made.net.state_dict().items()
            self._fresh[name] = {key: value.to("cpu", copy=True) for key, value in kept}
        return made

    def become(self, name: str, source: str) -> None:
        state = self._fresh[name] if source == TEACHER else self[source].net.state_dict()
        load_whole(self[name].net, state)

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        every = dict(self[name].net.named_parameters())
        frozen = self._frozen if name in self._frozen_in else None
        return every if frozen is None else {k: v for k, v in every.items() if not frozen.search(k)}

    def stored(self) -> dict[str, nn.Module]:
        return {
            TEACHER: self.teacher.denoiser.net,
            **{name: each.net for name, each in self._denoisers.items()},
        }

    def checkpointed(self) -> AbstractContextManager[None]:
        return checkpointed(self.stored().values())

    def state(self) -> dict[str, Tensor]:
        roles = self._denoisers.items()
        return {
            f"{name}.{key}": value for name, each in roles for key, value in each.net.state_dict().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, each in self._denoisers.items():
            load_whole(each.net, _of(name, state))


class Adapters(Roles):
    """A role is a LoRA adapter on the teacher's network, which stays in the type that the teacher holds it in.

    Args:
        teacher: what is distilled. ``Roles.teacher`` is another with its parts, which calls the shared network; this
            one and its pipeline stay as they are, on the same tensors.
        rank: of the student's adapter.
        alpha: scale of an adapter times its rank; None is the rank, a scale of 1.
        output: what the roles' network says; None is what the teacher's does.
        start: the adapter that turns the teacher's network into that output, by the names of
            ``SharedNetwork.weights``, in which every role then starts; None starts at zero.
        exact: the state of the teacher's network before its weights were rounded (bfloat16, quantised), for export.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        rank: int,
        alpha: float | None = None,
        *,
        output: Output | None = None,
        start: Mapping[str, Tensor] | None = None,
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = copy.copy(teacher.denoiser)
        self._shared = SharedNetwork(own.net, own.family.lora_targets, exact)
        self._scale, self._start = (alpha or rank) / rank, dict(start or {})
        self._ranks: dict[str, int] = {}
        own.net, own.adapter = self._shared.net, Adapter(self._shared, None)
        teacher = copy.copy(teacher)
        teacher.denoiser = teacher.start = own
        super().__init__(teacher, Student(own.net, own.path, output or own.output, own.family, own.shape))
        self._put(STUDENT, self.student, rank, trained=True)
        self._reset(STUDENT)

    def _put(self, name: str, denoiser: Denoiser, rank: int, trained: bool) -> None:
        """Makes a denoiser of the shared network the role ``name``, at zero."""
        own = self.teacher.denoiser
        self._shared.add(name, rank, self._scale * rank, trained)
        self._ranks[name] = rank
        denoiser.adapter, denoiser.guidance = Adapter(self._shared, name), own.guidance
        denoiser.compute = self._shared.compute

    def _reset(self, name: str) -> None:
        self._shared.reset(name)
        if self._start:
            self._copy(name, {**self._shared.weights(name), **self._start})

    @torch.no_grad()
    def _copy(self, name: str, weights: Mapping[str, Tensor]) -> None:
        for key, value in self._shared.weights(name).items():
            if value.shape != weights[key].shape:
                raise UserError(
                    f"the {name} network's adapter has rank {self._ranks[name]}, but what it starts as has another: "
                    "give it the student's rank"
                )
            value.copy_(held_like(weights[key], value))

    def _made(self, name: str, source: str, trained: bool, restarts: bool, rank: int | None) -> Denoiser:
        like = self.student if source == TEACHER else self[source]
        made = Denoiser(like.net, like.path, like.output, like.family, like.shape)
        self._put(name, made, rank or self._ranks[STUDENT if source == TEACHER else source], trained)
        if source != TEACHER:
            self._shared.follow_second_time(name, source)
        self.become(name, source)
        return made

    def become(self, name: str, source: str) -> None:
        if source == TEACHER:
            self._reset(name)
        else:
            self._copy(name, self._shared.weights(source))

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        return self._shared.weights(name)

    def stored(self) -> dict[str, nn.Module]:
        return {TEACHER: self._shared.net}

    def hold_alone(self) -> None:
        teacher = self.teacher
        if isinstance(teacher, PipelineTeacher) and teacher.owned:
            pipe = teacher.pipe
            names, networks = teacher.family.stretches(pipe), networks_in(self._shared.net)
            pipe.register_modules(**dict(zip(names, networks, strict=True)))

    def checkpointed(self) -> AbstractContextManager[None]:
        return self._shared.checkpointed()

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": v.detach() for name in self.names for key, v in self.weights(name).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name in self.names:
            self._copy(name, _of(name, state))


def _of(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A role's part of a state."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
