"""The student: a network on a path that starts as the teacher's, and keeps its scale and output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.streamed import on_host
from stepdistill.networks.switched import SwitchedNetworks
from stepdistill.networks.teacher import Teacher

SecondTime = Literal["embedded", "late_blocks", "stock"]
"""How a network is told where its jump ends: t - s beside its embedded timestep, s in late blocks, or s by a class of
diffusers' own."""


class Student(Denoiser):
    """The network that is distilled: of its own weights, or an adapter on the teacher's.

    Attributes:
        start: what it started as, where that is not the teacher.
    """

    start: str | None = None

    @staticmethod
    def from_teacher(teacher: Teacher) -> Student:
        """A student of its own weights, in float32, that starts as ``teacher.start``."""
        start, device = teacher.start, next(teacher.denoiser.net.parameters()).device
        return Student(
            start.trainable_net().eval().to(device), start.path, start.output, start.family, start.shape
        )

    @staticmethod
    def of_phases(experts: Sequence[Denoiser], phases: Sequence[Sequence[float]]) -> Student:
        """A student with an expert for each phase. Where the teacher's networks share the times, an expert is the one
        of its phase alone.

        Args:
            experts: in their order; changed in place.
            phases: the times of the calls of each.

        Raises:
            UserError: a phase for which the teacher has several networks.
        """
        for expert, times in zip(experts, phases, strict=True):
            # A call leads down from its time: at the teacher's very bound it is the next network's.
            if not expert.keep_serving([time - 1e-3 for time in times]):
                raise UserError(
                    f"a phase calls the student at {', '.join(f'{time:.4g}' for time in times)}, between which this "
                    "teacher changes its network: choose student.times (or options.shift) and options.phases so that "
                    f"each phase is on one side of {expert.net.bounds[0] / 1000:.4g}"  # type: ignore[index]
                )
        return Student.of_experts(experts, [(a[-1] + b[0]) / 2 for a, b in pairwise(phases)])

    @staticmethod
    def of_experts(experts: Sequence[Denoiser], bounds: Sequence[float]) -> Student:
        """A student of several networks, see experts.py; what is asked of one network is asked of the last."""
        last = experts[-1]
        made = Student(last.net, last.path, last.output, last.family, last.shape)
        made.adapter, made.guidance, made.compute = last.adapter, last.guidance, last.compute
        made.counter, made.who = last.counter, last.who
        made.experts, made.bounds = tuple(experts), tuple(bounds)
        return made

    @property
    def two_times(self) -> bool:
        """Whether the network is also told where its jump ends."""
        if self.adapter is not None:
            return self.adapter.has_slots
        return self.family.changes.has_second_time(self.net)

    def add_second_time(self, how: SecondTime = "embedded") -> None:
        """Gives the network its second time, which changes nothing at the start, or where s = t.

        Raises:
            UserError: where the network has no place for it.
        """
        if self.two_times:
            return
        if how == "late_blocks":
            self._refuse_several("options.second_time=late_blocks is of one network")
            if self.adapter is not None:
                self.adapter.tell_ends(self.family.changes.late_blocks)
            else:
                self.net = self.family.changes.late_blocks(self.net)
        elif how == "stock":
            self._refuse_lora("options.second_time=stock is another network class", "")
            self._refuse_several("options.second_time=stock is of one network")
            self.net = self.family.changes.any_step(self.net)
        elif self.adapter is not None:
            self.adapter.add_slots()
        else:
            self.net = self.family.changes.second_time(self.net)

    def add_guidance_input(self) -> None:
        """Gives the network the guidance scale as an input, which changes nothing at the start.

        Raises:
            UserError: where the family has no way to, or the student is a LoRA.
        """
        self._refuse_lora("options.guidance_range adds weights", ", or use one fixed options.guidance")
        self._refuse_several("options.guidance_range adds weights")
        self.net = self.family.changes.guidance_input(self.net)

    def make_slimmer(self, width: float, depth: float) -> None:
        """Replaces the network by a smaller one of its class, with new weights.

        Args:
            width: channels over the old ones, in (0, 1].
            depth: layers of each resolution over the old ones, in (0, 1].

        Raises:
            UserError: where the family has no smaller network, nothing would get smaller, or the student is a LoRA.
        """
        self._refuse_lora("a smaller student has new weights", "")
        if self.start is not None:
            raise UserError(
                f"student.start is {self.start}, but options.width={width:g} and options.depth={depth:g} give the "
                "student a new network: set both to 1, and it keeps that of student.start, whatever its size"
            )
        self._refuse_several("a smaller student has new weights")
        self.net = self.family.changes.slimmer(self.net, width, depth)

    def _refuse_lora(self, what: str, otherwise: str) -> None:
        if self.adapter is not None:
            raise UserError(f"{what}, which a LoRA cannot hold: set student.lora_rank=0{otherwise}")

    def _refuse_several(self, what: str) -> None:
        if isinstance(self.net, SwitchedNetworks):
            raise UserError(
                f"{what}, but this teacher has {len(self.net.networks)} networks, each for its own noise: take a "
                "method that changes none, such as dmd, phased_dmd or lcm"
            )

    def stock_net(self, sampler: Sampler, cond: Callable[[], Condition] = Condition) -> nn.Module:
        """The network as an ordinary diffusers class: an adapter is merged, and a second time folded away.

        Args:
            sampler: whose jumps the network makes.
            cond: any condition (B = 1), asked for where the network must be called to fold its second time.

        Raises:
            UserError: where the class cannot hold these jumps.
        """
        net = self.plain_net()
        if not self.two_times:
            return net
        plain = Student(net, self.path, self.output, self.family, self.shape)

        @torch.no_grad()
        def call() -> None:
            place = next(net.parameters()).device
            given, ends = cond().to(place), torch.tensor([*sampler.times, 0.0], device=place)
            for t, s in zip(ends.split(1), ends[1:].split(1), strict=False):
                plain.raw(t.new_zeros(1, *self.shape), t, given, s)

        return self.family.changes.fold_second_time(net, sampler.gap, call)

    def exported(self, round_to: Callable[[nn.Module], None] | None = None) -> Student:
        """The student as it is exported: itself, or, where its weights are to be others than those that are trained,
        one of whole networks of its own in float32. Those lie in the host's memory, as a GPU that trains large ones has
        no room for more: see ``streamed``.

        Args:
            round_to: rounds a network's weights, in place, to what they are saved in; None leaves them.
        """
        shared = None if self.adapter is None else self.adapter.shared
        if round_to is None and (shared is None or (shared.exact is None and shared.compute is None)):
            return self
        whole = []
        for each in self.experts or (self,):
            net = on_host(each.net) if each.adapter is None else each.plain_net(torch.device("cpu"))
            if round_to is not None:
                round_to(net)
            whole.append(Student(net, each.path, each.output, each.family, each.shape))
        return Student.of_experts(whole, self.bounds) if self.experts else whole[0]

    def _towards(self, s: Tensor) -> Tensor | None:
        return s if self.two_times else None

    def flow_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """The same read on the straight path: for x_t, t and s there, x_s = x_t - (t - s) u, whatever the own path is.

        DDIM steps commute with a change of path, so a flow map learnt there is one on the student's own path."""
        return self.predict_on(STRAIGHT, x_t, t, cond, self._towards(s)).velocity
