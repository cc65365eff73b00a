"""What methods may change in a network: its size, and inputs that it is given beside its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families._late_blocks import folded_ends
from stepdistill.families._second_time import add_slots, folded, told_of
from stepdistill.families.condition import GAP, Condition


class NetworkChanges:
    """What can be changed in a network of any class: it can be told a second time. Families whose networks have slots
    of their own have a subclass."""

    def slimmer(self, net: nn.Module, width: float, depth: float) -> nn.Module:
        """A smaller network of the same class with random weights: channels and layers over the old ones in (0, 1].

        Raises:
            UserError: where there is no smaller network.
        """
        raise UserError(
            "options.width and options.depth need a UNet2DModel or UNet2DConditionModel, not a "
            f"{type(net).__name__}: leave both at 1"
        )

    def guidance_input(self, net: nn.Module) -> nn.Module:
        """A copy of the network that also takes the guidance scale, changing nothing at the start.

        Raises:
            UserError: where the network has no slot for it.
        """
        raise UserError(
            f"options.guidance_range needs a network that takes a guidance embedding; a {type(net).__name__} has none. "
            "Use one fixed options.guidance."
        )

    def takes_guidance(self, net: Any) -> bool:
        """Whether the network has guidance embedded: it takes the scale as an input, and one call is guided."""
        return False

    def fold_guidance(self, net: nn.Module, guidance: float) -> nn.Module:
        """The network without that input that equals ``net`` wherever the scale is ``guidance``."""
        raise NotImplementedError(f"a {type(net).__name__} takes no guidance")

    def second_time(self, net: nn.Module) -> nn.Module:
        """The network that is also told t - s, the length of its jump, which changes nothing at the start: this one,
        changed, or another.

        Raises:
            UserError: where nothing in the network embeds a time.
        """
        add_slots(net)
        return net

    def late_blocks(self, net: nn.Module) -> nn.Module:
        """The network whose late blocks are told the end of a jump, see ``_late_blocks.py``: this one, with no new
        weights.

        Raises:
            UserError: where it has no such blocks, or what is embedded beside the time keeps it from a stock class.
        """
        raise UserError(
            "options.second_time=late_blocks needs a UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, not a "
            f"{type(net).__name__}: set it to embedded"
        )

    def any_step(self, net: nn.Module) -> nn.Module:
        """The network in a class of diffusers' own that is told the end of a jump: another, with its weights.

        Raises:
            UserError: where there is no such class.
        """
        raise UserError(
            "options.second_time=stock needs a WanTransformer3DModel, whose AnyFlowTransformer3DModel diffusers has, "
            f"not a {type(net).__name__}: set it to embedded"
        )

    def has_second_time(self, net: Any) -> bool:
        """Whether the network is one that :meth:`second_time`, :meth:`late_blocks` or :meth:`any_step` made."""
        return told_of(net) is not None

    def told_ends(self, net: nn.Module) -> bool:
        """Whether a network with a second time is told its own time at s, and not t - s."""
        told = told_of(net)
        return told is not None and bool(told.late)

    def draws_in_any_steps(self, net: nn.Module) -> bool:
        """Whether a stock pipeline tells the network the ends of its jumps, so that it draws in any number of them."""
        return False

    def fold_second_time(self, net: nn.Module, gap: float | None, call: Callable[[], object]) -> nn.Module:
        """The stock network that says what ``net`` does for a student's own jumps.

        Args:
            net: with a second time.
            gap: the t - s of all of them, which goes into a bias; None where they differ in length.
            call: calls ``net`` for each.

        Raises:
            UserError: for lengths that differ, where the network can hold but one.
        """
        return folded_ends(net, call) if self.told_ends(net) else folded(net, gap, call)

    def without_variance(self, net: nn.Module) -> nn.Module:
        """The network without the outputs that a family's ``call`` cuts off and the student's pipeline does not."""
        return net


def gap_of(x_t: Tensor, cond: Condition) -> Tensor:
    """t - s [B] out of a condition; 0, the instantaneous velocity, where nothing says how long the jump is."""
    gap = cond.get(GAP)
    return x_t.new_zeros(len(x_t)) if gap is None else gap


def of_one_length(gap: float | None, net: nn.Module) -> float:
    """The length of all jumps.

    Raises:
        UserError: they differ.
    """
    if gap is None:
        raise UserError(
            f"student.times makes jumps of unequal length, but a {type(net).__name__} can be exported with one alone: "
            "space them evenly, such as [1.0, 0.5]"
        )
    return gap
