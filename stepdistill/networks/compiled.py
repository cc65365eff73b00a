"""Networks compiled where they are (``torch.compile``), for as long as they are trained.

A compiled network is the same module with the same parameters: optimisers, averages, adapters and checkpoints know
nothing of it, and after training it is as it was. One compiled form serves one way of calling: which parameters want
gradients, whether a graph is recorded, the adapter that is on, the number of samples. A run of DMD makes four forms of
its networks together, six where they are adapters on one; each is made at its first call.

Not compiled are exact derivatives, which have no compiled form; calls that end inside a compiled part, as a
discriminator's of features do; and pictures that are drawn between updates, in another batch than that of training.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.networks.switched import networks_in

Compile = Literal["none", "regional", "full", "graphs"]

KINDS: tuple[Compile, ...] = get_args(Compile)
"""Values of ``train.compile``."""

FORMS = 64
"""Compiled forms of one kind of module, past which torch says so and calls it as it is. Networks of one class share
them, and so do blocks of several widths; torch's own limit is 8."""


def why_not_compiled(kind: str, device: torch.device) -> str | None:
    """Why networks cannot be compiled so on a device; None where they can, or are not to be."""
    if kind == "none":
        return None
    if kind == "graphs" and device.type != "cuda":
        return f"CUDA graphs need cuda, and this runs on {device.type}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch compiles for cuda through Triton, which is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "torch finds no C++ compiler (install g++, or name one in the variable CXX)"
    return None


def check_compile(kind: str, device: torch.device, attention: str, parallel: str) -> None:
    """Refuses what cannot be compiled.

    Args:
        kind, attention, parallel: of a recipe's ``train``.
        device: where it runs.

    Raises:
        UserError: with the reason and what can run.
    """
    if reason := why_not_compiled(kind, device):
        able = [other for other in KINDS if why_not_compiled(other, device) is None]
        raise UserError(f"train.compile is {kind}, but {reason}: choose one of {', '.join(able)}")
    for name, value, allowed in (
        ("attention", attention, ("auto", "sdpa", "math")),
        ("parallel", parallel, ("auto", "replicated")),
    ):
        if kind != "none" and value not in allowed:
            raise UserError(
                f"train.compile is {kind}, but networks are not compiled with train.{name}={value}: set that to "
                f"{' or '.join(allowed)}, or train.compile=none"
            )


def compiled_parts(net: nn.Module, kind: Compile) -> list[nn.Module]:
    """What of a network is compiled: nothing, its repeated blocks, or all of it.

    Raises:
        UserError: where it names no blocks.
    """
    if kind == "none":
        return []
    if len(each := networks_in(net)) > 1:
        return [part for one in each for part in compiled_parts(one, kind)]
    if kind != "regional":
        return [net]
    known: Any = type(net)
    named = getattr(known, "_repeated_blocks", None) or getattr(known, "_no_split_modules", None) or ()
    blocks = [module for module in net.modules() if type(module).__name__ in named]
    if not blocks:
        raise UserError(
            f"train.compile is regional, but a {known.__name__} names no blocks that repeat: set full or none"
        )
    return blocks


@contextmanager
def compiled(
    networks: Iterable[nn.Module], kind: Compile, *, same_sizes: bool
) -> Iterator[Callable[[], None]]:
    """Inside the ``with`` the networks run compiled, after it as they are. Gives what is to be called before each
    update: CUDA graphs then take the memory of the last one's results for the next.

    Args:
        networks: each once.
        kind: how.
        same_sizes: whether batches come in few sizes; each is then compiled for, else any.

    Raises:
        UserError: for a network that names no blocks, where these are to be compiled.
    """
    parts = [part for net in networks for part in compiled_parts(net, kind)]
    if not parts:
        yield lambda: None
        return
    import torch._dynamo

    graphs = kind == "graphs"
    for part in parts:
        part.compile(mode="reduce-overhead" if graphs else None, dynamic=False if same_sizes else None)
    try:
        with torch._dynamo.config.patch(recompile_limit=FORMS):
            yield torch.compiler.cudagraph_mark_step_begin if graphs else lambda: None
    finally:
        for part in parts:
            vars(part).pop("_compiled_call_impl", None)
        torch.compiler.reset()  # a later run in this process has its own forms to make


@contextmanager
def called_plainly(*modules: nn.Module) -> Iterator[None]:
    """Inside the ``with`` calls of these modules themselves run as they are; compiled parts of them stay compiled."""
    before = [(vars(module), module._compiled_call_impl) for module in modules]
    for own, _ in before:
        own.pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        for own, call in before:
            if call is not None:
                own["_compiled_call_impl"] = call


def uncompiled() -> AbstractContextManager[object]:
    """Inside the ``with`` compiled networks run as they are."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
