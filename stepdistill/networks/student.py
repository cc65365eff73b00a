"""A network on a path, and the student: a trained copy of the teacher's network that keeps its scale and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.diffusion.change_of_path import STRAIGHT
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.experts import Experts
from stepdistill.networks.lora import add_lora, lora_layers

if TYPE_CHECKING:
    from stepdistill.networks.teacher import PipelineTeacher


class Student(Denoiser):
    """The network that is distilled: full weights, or LoRA on frozen teacher weights."""

    @staticmethod
    def of(denoiser: Denoiser, device: torch.device) -> Student:
        """A student that starts as ``denoiser`` and trains all weights, in float32, on ``device``."""
        net = denoiser.trainable_net().eval().to(device)
        return Student(net, denoiser.path, denoiser.output, denoiser.family)

    @staticmethod
    def from_teacher(
        teacher: PipelineTeacher,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        adapter: Mapping[str, Tensor] | None = None,
    ) -> Student:
        """A student that starts as the teacher, in the output kind of ``teacher.start``.

        Args:
            teacher: whose network is copied, in float32.
            lora_rank: 0 trains all weights; otherwise the rank of the adapter that is trained.
            lora_alpha: scale of the adapter times its rank; default the rank, a scale of 1.
            adapter: the weights with which the adapter turns the teacher's own network into ``teacher.start``; None
                where it starts at zero.
        """
        start = teacher.start
        source = teacher.denoiser if adapter else start
        net = source.trainable_net().requires_grad_(lora_rank == 0)
        if lora_rank:
            add_lora(net, source.family.lora_targets, lora_rank, lora_alpha or float(lora_rank))
            net.load_state_dict(adapter or {}, strict=False)
        return Student(net.eval().to(teacher.device), start.path, start.output, start.family, start.shape)

    @property
    def two_times(self) -> bool:
        """Whether the network is also told where its jump ends."""
        first = self.net.nets[0] if isinstance(self.net, Experts) else self.net
        return self.family.changes.has_second_time(first)

    def add_second_time(self) -> None:
        """Gives the network its second time t - s, which changes nothing at the start.

        Raises:
            UserError: where the family has no way to, or the student is a LoRA.
        """
        if self.two_times:
            return
        self._refuse_lora("this method adds a second time to the network", "")
        self.net = self.family.changes.second_time(self.net)

    def add_guidance_input(self) -> None:
        """Gives the network the guidance scale as an input, which changes nothing at the start.

        Raises:
            UserError: where the family has no way to, or the student is a LoRA.
        """
        self._refuse_lora("options.guidance_range adds weights", ", or use one fixed options.guidance")
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
        self.net = self.family.changes.slimmer(self.net, width, depth)

    def _refuse_lora(self, what: str, otherwise: str) -> None:
        if lora_layers(self.net):
            raise UserError(f"{what}, which a LoRA cannot hold: set student.lora_rank=0{otherwise}")

    def stock_net(self, gap: float) -> nn.Module:
        """The network as an ordinary diffusers class: with a second time, its constant embedding of t - s = ``gap`` is
        folded into a bias; otherwise the network itself. ``gap`` is that of the sampler, ``Sampler.gap``."""
        return self.family.changes.fold_second_time(self.net, gap) if self.two_times else self.net

    def _towards(self, s: Tensor) -> Tensor | None:
        return s if self.two_times else None

    def flow_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """The same read on the straight path: for x_t, t and s there, x_s = x_t - (t - s) u, whatever the own path is.

        DDIM steps commute with a change of path, so a flow map learnt there is one on the student's own path."""
        return self.predict_on(STRAIGHT, x_t, t, cond, self._towards(s)).velocity
