"""Whether convolutions are faster with channels last in memory: python eval/bench/layouts.py

A teacher's network and VAE (decoder), forward and backward, and forward alone, in both layouts by turns. Prints medians
in milliseconds and the ratio, channels last over first: below 1, it wins. `--device cuda --precision bf16` for a GPU,
`--teacher FOLDER` for a pipeline of one's own with a UNet. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.networks.loading import load_teacher
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher


def passes(
    net: nn.Module, call: Callable[[nn.Module], Tensor], device: str, low: bool
) -> dict[str, Callable[[], None]]:
    """What is timed of a network, by name."""

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
            call(net)

    def learn() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=low):
            said = call(net)
        torch.autograd.grad(said.square().mean(), [p for p in net.parameters()], allow_unused=True)

    return {"forward": forward, "forward and backward": learn}


def milliseconds(call: Callable[[], None], device: str) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def compare(what: str, net: nn.Module, call: Callable[[nn.Module], Tensor], options: Any) -> None:
    """Prints a row for each kind of pass."""
    last: Any = copy.deepcopy(net)
    layouts = [net, last.to(memory_format=torch.channels_last)]
    both = [passes(each, call, options.device, options.precision == "bf16") for each in layouts]
    for name in both[0]:
        found: list[list[float]] = [[], []]
        for turn in range(options.repeats + 2):
            for i in (0, 1) if turn % 2 else (1, 0):
                took = milliseconds(both[i][name], options.device)
                if turn >= 2:
                    found[i].append(took)
        first, second = (statistics.median(each) for each in found)
        print(f"{what:8}  {name:20}  first {first:8.2f}  last {second:8.2f}  ratio {second / first:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--teacher", default="emoji")
    options = parser.parse_args()
    teacher = PipelineTeacher(load_teacher(options.teacher), options.device)
    student = Student.from_teacher(teacher)
    codec = teacher.codec
    x = torch.randn(options.batch, *codec.shape, device=options.device)
    t, cond = torch.full((options.batch,), 0.5, device=options.device), codec.encode(["red"] * options.batch)

    def network(net: nn.Module) -> Tensor:
        student.net = net
        return student.raw(x, t, cond)

    compare("network", student.net, network, options)
    vae = copy.deepcopy(teacher.pipe.vae).requires_grad_(True)
    compare("VAE", vae, lambda net: net.decode(x, return_dict=False)[0], options)  # type: ignore[operator]


if __name__ == "__main__":
    main()
