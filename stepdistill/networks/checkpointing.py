"""Networks that keep no more than the inputs of their blocks for the backward pass, which runs each block once more
(gradient checkpointing; Chen et al. 2016, 1604.06174).

diffusers says where the blocks are; torch's variant that is not reentrant runs them, so that what is not a leaf, an
exact derivative and a forward that ends early stay what they are. A call without a graph is as before. Losses and
gradients are those of plain networks to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import UserError
from stepdistill.families._second_time import jumping, told_of

FLAG, CALL = "gradient_checkpointing", "_gradient_checkpointing_func"
"""What diffusers' modules read in their forward."""


def call_twice(
    block: Callable[..., Any], *args: Any, again: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Any:
    """Calls a block now, and again in the backward pass, there within ``again()`` and under the function modes of now:
    torch would leave off such as that of our own attention."""
    later = _Again(_get_current_function_mode_stack(), again)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), later))


class _Again(AbstractContextManager[None]):
    """Where a block is called again: entered once for every backward pass of one graph."""

    def __init__(
        self, modes: list[TorchFunctionMode], again: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._modes, self._again = modes, again
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for place in (*self._modes, self._again()):
                stack.enter_context(place)
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().close()


def check_checkpointing(net: nn.Module) -> None:
    """Refuses a network that cannot run its blocks again.

    Raises:
        UserError: it is not diffusers', or its class does not do so.
    """
    from diffusers import ModelMixin

    able = isinstance(net, ModelMixin) and net._supports_gradient_checkpointing
    if not able or not any(FLAG in vars(module) for module in net.modules()):
        raise UserError(
            f"train.checkpointing is true, but diffusers has no gradient checkpointing for a {type(net).__name__}: set "
            "it to false"
        )


def calls_of(net: nn.Module) -> Callable[..., Any]:
    """:func:`call_twice` for blocks of this network: again with the second time that they were told."""
    told = told_of(net)
    if told is None:
        return call_twice

    def call(block: Callable[..., Any], *args: Any) -> Any:
        gap = told.gap
        return call_twice(block, *args, again=lambda: jumping(told, gap))

    return call


@contextmanager
def checkpointed(networks: Iterable[nn.Module], call: Callable[..., Any] | None = None) -> Iterator[None]:
    """Inside the ``with`` the networks keep the inputs of their blocks alone, after it they are as they were.

    Args:
        networks: each once.
        call: calls a block with its arguments, as :func:`call_twice` does; None is :func:`calls_of`.

    Raises:
        UserError: see :func:`check_checkpointing`.
    """
    found: list[Any] = list(networks)
    for net in found:
        check_checkpointing(net)
    modules = [vars(module) for net in found for module in net.modules() if FLAG in vars(module)]
    before = [{name: own[name] for name in (FLAG, CALL) if name in own} for own in modules]
    try:
        for net in found:
            net.enable_gradient_checkpointing(call or calls_of(net))
        yield
    finally:
        for own, was in zip(modules, before, strict=True):
            own.pop(CALL, None)
            own.update(was)
