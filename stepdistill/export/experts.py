"""The networks of a student as stock ones: one, or several that its pipeline switches between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.condition import Condition
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.switched import SwitchedNetworks, networks_in
from stepdistill.system.travelling import travelling_module


def stock_networks(
    student: Student, sampler: Sampler, cond: Callable[[], Condition]
) -> tuple[list[nn.Module], list[float]]:
    """The student's networks, and for each the network's own time from which on up it is called. Of a teacher's several
    there are those that the student's steps call. ``cond`` gives any condition, see ``Student.stock_net``."""
    family, path = student.family, student.path
    if not student.experts:
        net = student.stock_net(sampler, cond)
        if isinstance(net, SwitchedNetworks) and sampler.grid is None:
            net = net.serving(family.time(path, torch.tensor(sampler.times)))
        starts = list(net.starts) if isinstance(net, SwitchedNetworks) else [0.0]
        return [family.changes.without_variance(each) for each in networks_in(net)], starts
    edges = [1.0, *student.bounds, 0.0]
    found = []
    for each, high, low in zip(student.experts, edges, edges[1:], strict=False):
        net = each.plain_net()
        if isinstance(net, SwitchedNetworks):
            own = [time - 1e-3 for time in sampler.times if low < time <= high]  # see Student.of_phases
            net = net.serving(family.time(path, torch.tensor(own)))
        found.append(family.changes.without_variance(net))
    return found, [*family.time(path, torch.tensor(student.bounds)).tolist(), 0.0]


def one_network(nets: Sequence[nn.Module], timesteps: Sequence[float]) -> nn.Module:
    """Several experts as one component: a diffusers network made of stock ones, whose class travels along.

    Args:
        nets: the experts, stock diffusers networks of one config; their weights are copied.
        timesteps: the bounds between them in the network's own time, descending.
    """
    config: Any = nets[0].config
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    made: nn.Module = travelling_module("phased_experts").PhasedExperts(
        type(nets[0]).__name__, plain, list(timesteps)
    )
    made.load_state_dict(
        {f"experts.{i}.{k}": v for i, net in enumerate(nets) for k, v in net.state_dict().items()}
    )
    return made.to(next(nets[0].parameters()).device).eval()


def adapter_files(student: Student) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The adapters of a student by the folder that each is written to, "" for the only one: what peft keeps of it, and
    its weights under the names of one stock network. Of the adapters on a teacher's several networks, those that were
    trained."""
    found = {}
    for i, each in enumerate(student.experts or (student,)):
        if each.adapter is None or each.adapter.name is None or each.adapter.has_slots:
            continue
        shared, name = each.adapter.shared, each.adapter.name
        state, config = (
            {key: value.detach() for key, value in shared.weights(name).items()},
            shared.config(name),
        )
        folder = f"expert-{i + 1}" if student.experts else ""
        if not isinstance(each.net, SwitchedNetworks):
            found[folder] = config, state
            continue
        for k in range(len(each.net.networks)):
            prefix = f"networks.{k}."
            own = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            if any(bool(v.any()) for key, v in own.items() if ".lora_B." in key):  # B is zero at the start
                found[folder or f"expert-{k + 1}"] = config, own
    return found
