"""What the processes of a run do together: who holds what of its networks, how gradients and numbers are averaged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stepdistill.errors import UserError
from stepdistill.losses.objective import Objective
from stepdistill.networks.sharding import ShardedNetwork
from stepdistill.networks.shared_tokens import SharedTokens
from stepdistill.system.processes import Processes
from stepdistill.training.gradient_means import GradientMeans
from stepdistill.training.launcher import Fsdp, fsdp


def take_turn(trained: dict[str, list[nn.Parameter]], turn: str) -> None:
    """Lets gradients reach the parameters of one network alone."""
    for name, parameters in trained.items():
        for parameter in parameters:
            parameter.requires_grad_(name == turn)


class Parallel(ABC):
    """How the processes of a run share it. Every process calls every function, in the same order.

    Args:
        processes: which one this is, and of how many.
        device: where it computes.

    Class attributes:
        calls_together: whether a network can be called by all processes alone.
        in_parts: whether that is as each holds a part of it.
    """

    calls_together = False
    in_parts = False

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device

    @property
    def rank(self) -> int:
        return self.processes.rank

    @property
    def count(self) -> int:
        return self.processes.count

    @property
    def readers(self) -> Processes:
        """Who reads other samples than others: this one, and of how many."""
        return self.processes

    @property
    def main(self) -> bool:
        """Whether it is the process that writes and shows."""
        return self.processes.main

    def spread(self, networks: Iterable[nn.Module]) -> None:
        """Shares networks out, where they are: once, before optimisers and averages are made of their parameters."""
        return None

    def gather(self, kept: Iterable[nn.Module]) -> None:
        """Takes :meth:`spread` back at the end of a run: the main process has these networks whole, gathered one tensor
        after the other; of all others nothing is left anywhere."""
        return None

    def let_go(self) -> None:
        """Frees weights that calls have gathered and still hold; after calls without a backward pass."""
        return None

    def expect(self, parameters: list[nn.Parameter]) -> None:
        """Says that the next backward pass completes the gradients of these parameters, which may then be averaged as
        they come."""
        return None

    @abstractmethod
    def average(self, parameters: list[nn.Parameter]) -> None:
        """Replaces gradients by their mean over processes, after the backward passes of a step."""

    def norm(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        """The norm of all their gradients, a scalar, to which they are scaled down where ``clip`` is less; 0 leaves
        them."""
        found = [p.grad for p in parameters if p.grad is not None]
        if any(grad.dtype != torch.float32 for grad in found):
            # The norm of a bfloat16 tensor is one, with three digits.
            found = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in found]
        norm = torch.nn.utils.get_total_norm(found)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def means(self, values: list[float]) -> list[float]:
        """Means over processes; a NaN of any is a NaN of all, so that all stop together."""
        if self.count == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return [value / self.count for value in sums.tolist()]


class OneProcess(Parallel):
    """There is no other."""

    def average(self, parameters: list[nn.Parameter]) -> None:
        return None


class Replicated(Parallel):
    """Every process holds the whole run. Gradients are averaged while the last backward pass of a step goes on, by
    hooks of the parameters: networks that take turns, adapters and stopped gradients need no wrapper."""

    def __init__(self, processes: Processes, device: torch.device) -> None:
        super().__init__(processes, device)
        self._means: dict[int, GradientMeans] = {}

    def expect(self, parameters: list[nn.Parameter]) -> None:
        self._of(parameters).expect()

    def average(self, parameters: list[nn.Parameter]) -> None:
        self._of(parameters).finish()

    def _of(self, parameters: list[nn.Parameter]) -> GradientMeans:
        """Those of a network, made once: its list lives as long as the run."""
        if id(parameters) not in self._means:
            self._means[id(parameters)] = GradientMeans(parameters, self.readers.count)
        return self._means[id(parameters)]


def check_shared_heads(objective: Objective, share: int) -> None:
    """Refuses what is trained beside the networks, which alone ``share`` processes can call together.

    Raises:
        UserError: a head is.
    """
    if heads := [k for k, each in objective.trained.items() if each.extra and list(each.extra.parameters())]:
        raise UserError(
            f"train.context_parallel is {share}, which is for networks alone, but {heads[0]} trains a head on a "
            "network's features: set GAN weights to 0, or train.context_parallel to 1"
        )


class SharedCalls(Replicated):
    """Every process holds the whole run, and ``share`` of them make each call together, on the same samples: see
    stepdistill/networks/shared_tokens.py."""

    calls_together = True

    def __init__(self, processes: Processes, device: torch.device, share: int) -> None:
        super().__init__(processes, device)
        if processes.count % share:
            raise UserError(
                f"train.context_parallel is {share}, which does not divide {processes.count} processes: set it to a "
                "divisor"
            )
        shape, names = (processes.count // share, 1, share), ("samples", "ring", "ulysses")
        self._share, self._mesh = share, init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._shared: list[SharedTokens] = []

    @property
    def readers(self) -> Processes:
        return Processes(self.rank // self._share, self.count // self._share, self.device)

    def spread(self, networks: Iterable[nn.Module]) -> None:
        self._shared += [SharedTokens(net, self._mesh["ring", "ulysses"]) for net in networks]

    def gather(self, kept: Iterable[nn.Module]) -> None:
        for shared in self._shared:
            shared.undo()
        self._shared.clear()


class Sharded(Parallel):
    """Every process holds a part of every network that was spread, of its gradients, moments and average, and each call
    gathers the weights (FSDP2, see stepdistill/networks/sharding.py). Small modules beside them, such as the head of a
    discriminator, are replicated. An accelerate config of FSDP2 says whether gathered weights go after a call."""

    calls_together = in_parts = True

    def __init__(self, processes: Processes, device: torch.device) -> None:
        super().__init__(processes, device)
        self._mesh = init_device_mesh(device.type, (processes.count,))
        self._spread: list[ShardedNetwork] = []
        self._reshard = (fsdp() or Fsdp()).reshard

    def spread(self, networks: Iterable[nn.Module]) -> None:
        self._spread += [ShardedNetwork(net, self._mesh, self._reshard) for net in networks]

    def gather(self, kept: Iterable[nn.Module]) -> None:
        self.let_go()
        wanted = list(kept)
        for network in self._spread:
            network.undo(whole=any(network.net is net for net in wanted), keep=self.main)
        self._spread.clear()

    def let_go(self) -> None:
        if not self._reshard:
            for network in self._spread:
                network.let_go()

    def average(self, parameters: list[nn.Parameter]) -> None:
        self.let_go()  # before an update: a later call would take the weights of before it
        # The gradients of what was spread are averaged as they are shared out, in the backward pass.
        if replicated := [p for p in parameters if not isinstance(p, DTensor)]:
            GradientMeans(replicated, self.count).finish()

    @torch.no_grad()
    def norm(self, parameters: list[nn.Parameter], clip: float) -> Tensor:
        found = [p.grad for p in parameters if p.grad is not None]
        parts = [grad.to_local() for grad in found if isinstance(grad, DTensor)]
        own = [grad for grad in found if not isinstance(grad, DTensor)]
        square = torch.nn.utils.get_total_norm(parts).to(self.device).square()
        torch.distributed.all_reduce(square)
        norm = (square + torch.nn.utils.get_total_norm(own).to(self.device).square()).sqrt()
        if clip:
            torch._foreach_mul_([*parts, *own], (clip / (norm + 1e-6)).clamp_max(1.0))
        return norm


def by_kind(parameters: list[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups of an optimiser, in the order of the parameters: none has both sharded and replicated ones, which no fused
    update takes together."""
    return [{"params": list(group)} for _, group in groupby(parameters, lambda p: isinstance(p, DTensor))]


KINDS: dict[str, type[Parallel]] = {"auto": Replicated, "replicated": Replicated, "sharded": Sharded}
"""By ``train.parallel``."""


def parallel_of(name: str, processes: Processes, device: torch.device, share: int = 1) -> Parallel:
    """What ``train.parallel`` names, for the processes there are, of which ``share`` make a call together."""
    if share > 1:
        return SharedCalls(processes, device, share)
    return OneProcess(processes, device) if processes.count == 1 else KINDS[name](processes, device)
