"""What a training step asks of a GPU beside its networks, counted without one: python eval/bench/launches.py [--sites]

A short run of the real loop at the embedded teacher, on a processor, once it is under way. Every operator of torch that
a GPU would run is one launch; views, metadata and memory alone are left out, and an optimiser's operator over all of
its weights is one. An operator belongs to the networks where it is in a call of one or in the backward pass of what
that call made. What is done to tensors that lie in host memory in a run on a GPU, too, is listed apart.

Waits are what a processor waits for a GPU at: a number or a list read from the device, an index whose length is data, a
copy that is not pinned. What the loop reads once in ``train.log_every`` steps is not among them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import stepdistill
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

PACKAGE = Path(stepdistill.__file__).parent
UNITS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "DMD 1+1": ("dmd", 2, ("options.warm_start=0", "options.fake_warm_start=0", "options.fake_updates=1")),
    "LCM": ("lcm", 1, ("options.pairs=64", "options.pair_steps=4")),
    "sCM": ("scm", 1, ("options.pairs=64", "options.pair_steps=4", "options.tangent_warmup=1")),
    "MeanFlow": ("meanflow", 1, ("options.pairs=64", "options.pair_steps=4", "options.warm_start=0")),
}
"""What is counted: a method, the steps of its unit and its options, all at the embedded teacher."""

WARM, COUNTED = 4, 4
"""Units of a run that are left out, as the first ones make the optimisers' state, and units that are counted."""

IN_HOST_MEMORY = ("data/",)
"""Files whose tensors lie in host memory in a run on a GPU, too."""

DRAWN_THERE = ("randn", "rand", "randint", "stack")
"""And what ``diffusion/draws.py`` does there."""

FREE = set(
    "empty empty_like empty_strided new_empty new_empty_strided detach detach_ lift_fresh is_pinned _pin_memory "
    "_reshape_alias _make_dual _fw_primal _unpack_dual set_ resize_ sym_size _unsafe_view _has_same_storage_numel "
    "_new_zeros_with_same_feature_meta _record_function_enter_new _record_function_exit _local_scalar_dense".split()
)
"""Operators beside views that run nothing on a GPU."""

READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
COPIES = {torch.tensor, torch.as_tensor}


@dataclass
class Counts:
    """Operators by the line of the package that asked for them.

    Attributes:
        networks, outside, host: how many.
        waits: where a processor would wait.
    """

    networks: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)


class Where:
    """Which line of the package is running, and whether a network is.

    Args:
        networks: whose calls are theirs.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        self.depth, self._ranges, self._began = 0, list[tuple[int, int]](), list[int]()
        self._handles = [net.register_forward_pre_hook(self._enter) for net in networks]
        self._handles += [net.register_forward_hook(self._leave, always_call=True) for net in networks]

    def _enter(self, *_: Any) -> None:
        self.depth += 1
        self._began.append(torch._C._autograd._get_sequence_nr())

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        self._ranges.append((self._began.pop(), torch._C._autograd._get_sequence_nr()))

    @property
    def in_network(self) -> bool:
        """In a call of one, or in the backward pass of a node that it made; weights gather their gradients there."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self.depth > 0
        number = node._sequence_nr()
        gathers = type(node).__name__ == "AccumulateGrad" or "AccumulateGrad" in node.name()
        return gathers or any(first <= number < last for first, last in self._ranges)

    def forget(self) -> None:
        """Graphs of the step before are gone."""
        self._ranges.clear()

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def line() -> str:
        """``file:line`` of the package's innermost frame, and of the two that called it."""
        frame: FrameType | None = sys._getframe(1)
        found: list[str] = []
        while frame is not None and len(found) < 3:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents and path.name != "remembered.py":
                found.append(f"{path.relative_to(PACKAGE)}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found) or "outside the package"


class Launches(TorchDispatchMode):
    """Counts operators as they are run."""

    def __init__(self, where: Where, counts: Counts) -> None:
        super().__init__()
        self.where, self.counts = where, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, line = func.overloadpacket.__name__, self.where.line()
        waits = name in (
            "_local_scalar_dense",
            "is_nonzero",
            "nonzero",
            "_unique2",
            "masked_select",
            "unique_dim",
        )
        masks = name in ("index", "index_put_", "index_put") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        host = line.startswith(IN_HOST_MEMORY) or (name in DRAWN_THERE and "diffusion/draws.py" in line)
        waits = waits and not host and "draws.py" not in line
        if waits or masks:
            self.counts.waits[line] += 1
        if not func.is_view and name not in FREE:
            kind = "host" if host else "networks" if self.where.in_network else "outside"
            getattr(self.counts, kind)[f"{line}  {name}"] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts reads and copies that no operator shows on a processor."""

    def __init__(self, where: Where, counts: Counts) -> None:
        super().__init__()
        self.where, self.counts = where, counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or (func in COPIES and (kwargs or {}).get("device") is not None):
            line = self.where.line()
            if not line.startswith((*IN_HOST_MEMORY, "training/unread.py")):
                self.counts.waits[line] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(job: Assembled, unit: int) -> Iterator[Counts]:
    """Counts the last units of a run within it."""
    counts, method = Counts(), job.method
    networks = [*method.roles.stored().values(), job.teacher.denoiser.net, job.teacher.start.net]
    where = Where(list({id(net): net for net in networks}.values()))
    modes = (Waits(where, counts), Launches(where, counts))
    plain, counted = job.objective.turn, ExitStack()

    def turn(step: int) -> Any:
        where.forget()
        if step == WARM * unit:
            for mode in modes:
                counted.enter_context(mode)
        elif step == (WARM + COUNTED) * unit:
            counted.close()
        return plain(step)

    job.objective.turn = turn  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        counted.close()
        where.remove()


def count(name: str, batch: int) -> Counts:
    """What one unit asks for, summed over ``COUNTED`` of them."""
    method, unit, sets = UNITS[name]
    steps = (WARM + COUNTED) * unit + 1  # the last one only ends the count
    recipe = load_recipe(
        method=method,
        teacher="emoji",
        sets=[
            *sets,
            *("train.preview_every=0", "train.average=0.99", "evaluate=false", f"train.batch={batch}"),
            *(f"train.updates={steps}", f"train.log_every={steps}"),
        ],
    )
    job = assemble(resolve(recipe), Accelerator(cpu=True), None)
    with tempfile.TemporaryDirectory() as folder:
        data = training_data(job, Path(folder))
        with counting(job, unit) as counts:
            train(job.objective, data, job.recipe, Path(folder), job.accelerator)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", nargs="+", choices=list(UNITS), default=list(UNITS), metavar="UNIT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--sites", action="store_true", help="the lines that ask for what is outside networks"
    )
    chosen = parser.parse_args()
    print("| unit | in networks | outside | in host memory | waits |")
    print("|---|---|---|---|---|")
    for name in chosen.units:
        counts = count(name, chosen.batch)
        sums = [
            sum(each.values()) / COUNTED
            for each in (counts.networks, counts.outside, counts.host, counts.waits)
        ]
        print(f"| {name} | " + " | ".join(f"{value:g}" for value in sums) + " |", flush=True)
        if chosen.sites:
            for kind in ("outside", "host", "waits"):
                print(f"\n{kind}:")
                for line, number in getattr(counts, kind).most_common():
                    print(f"  {number / COUNTED:6g}  {line}")
            print()


if __name__ == "__main__":
    main()
