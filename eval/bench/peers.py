"""The same update of the same network here and in other toolkits, in one process: python eval/bench/peers.py

A line is one network's update: random numbers, losses, backward, AdamW, and here the making of the batch too; both
sides are float32 with averages, GAN and clipping off. First both get the same weights, noise and times, and must agree:
losses to six digits, gradients with a cosine above 0.999. Then each draws its own, in turns; times are medians, a ratio
is the median of ours over theirs of one round. Passes are counted in forwards of B samples, those with a graph in
brackets, a derivative as one. ``saved`` is what is held for backward at most, ``live`` all tensors made meanwhile.
Peers that are not installed are named. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import math
import statistics
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peer import STEP, Pair, Update
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepdistill.system.provenance import provenance

PEERS = {
    "fastgen": "clone github.com/NVlabs/FastGen, install its requirements.txt, put its folder on PYTHONPATH",
    "modelopt": "pip install nvidia-modelopt==0.47.0 omegaconf pulp",
    "rectified_flow": "pip install rectified-flow==1.0.1",
    "diffusers": "a part of this package",
}
MIB = 2**20


@dataclass
class Passes:
    """Forwards of networks in samples, all and with a graph."""

    samples: int = 0
    with_graph: int = 0


@contextmanager
def counted(networks: list[nn.Module]) -> Iterator[Passes]:
    """Counts what networks are called for."""
    passes = Passes()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        passes.samples += len(first)
        passes.with_graph += len(first) if torch.is_grad_enabled() and first.requires_grad else 0

    handles = [net.register_forward_hook(note) for net in networks]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


class Bytes:
    """Bytes of storages, each counted while something holds it, and their most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._holders: Counter[int] = Counter()

    def hold(self, key: int, size: int) -> None:
        self.now += 0 if self._holders[key] else size
        self._holders[key] += 1
        self.most = max(self.most, self.now)

    def release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        self.now -= 0 if self._holders[key] else size


@contextmanager
def saved(parameters: set[int]) -> Iterator[Bytes]:
    """Counts what autograd saves for backward, but for storages at these addresses."""
    held = Bytes()

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            self.tensor, self.key, self.size = tensor, storage.data_ptr(), storage.nbytes()
            held.hold(self.key, self.size)

        def __del__(self) -> None:
            held.release(self.key, self.size)

    def keep(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in parameters else Kept(tensor)

    def give(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, Kept) else kept

    with saved_tensors_hooks(keep, give):
        yield held


class Live(TorchDispatchMode):
    """Within it, bytes of the storages that operators make are counted for as long as these live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Bytes()
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), before)
        return out

    def _note(self, storage: Any, before: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in before or key in self._seen:
            return
        self.bytes.hold(key, size)
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.bytes.release(key, size)


def gradients(update: Update) -> tuple[float, list[Tensor]]:
    """The loss on the given numbers, and its gradients."""
    for weight in update.trained:
        weight.grad = None
    loss = update.given()
    loss.backward()
    found = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in update.trained]
    for weight in update.trained:
        weight.grad = None
    return float(loss.detach()), found


def agreement(pair: Pair) -> dict[str, float]:
    """Both losses, and cosine and ratio of norms of the gradients."""
    for ours, theirs in zip(pair.ours.trained, pair.theirs.trained, strict=True):
        assert torch.equal(ours, theirs), "the weights differ"
    (loss, mine), (their_loss, their) = gradients(pair.ours), gradients(pair.theirs)
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(mine, their, strict=True))
    norm, their_norm = (
        math.sqrt(sum(float(g.double().square().sum()) for g in all_of)) for all_of in (mine, their)
    )
    return {
        "loss": loss,
        "loss apart": abs(loss - their_loss) / abs(their_loss),
        "cosine": product / (norm * their_norm),
        "norms": norm / their_norm,
    }


def weighed(update: Update, batch: int) -> dict[str, float]:
    """Passes, and bytes saved and live at most, of a loss and its backward on the given numbers."""
    own = {weight.untyped_storage().data_ptr() for net in update.networks for weight in net.parameters()}
    found: dict[str, float] = {}
    with counted(list(update.networks)) as passes, saved(own) as held:
        update.given().backward()
    found["passes"], found["with graph"] = passes.samples / batch, passes.with_graph / batch
    found["saved MiB"] = held.most / MIB
    for weight in update.trained:
        weight.grad = None
    gc.collect()
    with Live() as live:
        update.given().backward()
    found["live MiB"] = live.bytes.most / MIB
    for weight in update.trained:
        weight.grad = None
    return found


def stepper(update: Update) -> Callable[[int], float]:
    """Seconds of a whole update, with fused AdamW."""
    optimizer = torch.optim.AdamW(update.trained, lr=1e-6, fused=True)

    def step(number: int) -> float:
        began = time.perf_counter()
        update.drawn(number).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update.after()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def timed(pair: Pair, repeats: int, updates: int) -> dict[str, float]:
    """Milliseconds of an update on both sides, in turns of a few updates, and the ratio. Weights are put back after
    it, as further pairs are made of them."""
    trained = [*pair.ours.trained, *pair.theirs.trained]
    before = [weight.detach().clone() for weight in trained]
    sides = {"ours": stepper(pair.ours), "theirs": stepper(pair.theirs)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    number = STEP + 1
    for repeat in range(repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 else -1]:  # who goes first changes, too
            took = statistics.mean(sides[name](number + k) for k in range(updates))
            if repeat:  # the first round warms up
                seconds[name].append(took)
        number += updates
    with torch.no_grad():
        torch._foreach_copy_(trained, before)
    ours, theirs = seconds["ours"], seconds["theirs"]
    return {
        "ours ms": statistics.median(ours) * 1e3,
        "theirs ms": statistics.median(theirs) * 1e3,
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def compare(peer: str, pair: Pair, repeats: int, updates: int) -> bool:
    """Prints a line, and says whether the two agree."""
    told = agreement(pair)
    agree = told["loss apart"] < 5e-6 and told["cosine"] > 0.999 and abs(told["norms"] - 1) < 1e-3
    ours, theirs = weighed(pair.ours, pair.batch), weighed(pair.theirs, pair.batch)
    line = (
        f"{peer + ' ' + pair.name:<34}{told['loss apart']:>9.0e}{told['cosine']:>11.7f}{told['norms']:>9.5f}"
    )
    calls = [f"{one['passes']:g} ({one['with graph']:g})" for one in (ours, theirs)]
    line += f"  {calls[0]:>7} / {calls[1]:<7}"
    for key in ("saved MiB", "live MiB"):
        line += f"{ours[key]:>7.1f} /{theirs[key]:>6.1f}"
    if repeats and agree:
        took = timed(pair, repeats, updates)
        line += f"{took['ours ms']:>8.0f} /{took['theirs ms']:>6.0f}{took['ratio']:>8.3f}"
    print(line if agree else f"{line}  DISAGREE", flush=True)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7, help="rounds; 0 times nothing")
    parser.add_argument("--updates", type=int, default=2, help="of each side in a round")
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    modules = {}
    for name in chosen.peer:
        try:
            modules[name] = importlib.import_module(f"peer_{name}")
        except ImportError as error:
            print(f"left out: {name} ({error}). To have it: {PEERS[name]}")
    print(f"batch {chosen.batch}, {provenance()['hardware']}; ours / theirs")
    print(
        f"{'':<34}{'loss':>9}{'cosine':>11}{'norms':>9}  {'passes (with graph)':>17}"
        f"{'saved MiB':>13}{'live MiB':>15}{'ms':>16}{'ratio':>8}"
    )
    agree = [
        compare(name, pair, chosen.repeats, chosen.updates)
        for name, module in modules.items()
        for pair in module.pairs(chosen.batch)
    ]
    if not all(agree):
        raise SystemExit("not all agree")


if __name__ == "__main__":
    main()
